"""Patches and positions. Legend: B batch, N tokens, D width, H/W image height and width, C channels."""

import jax
import numpy as np
from flax import nnx

from common.nn.layers import Linear, take_tokens
from common.nn.ops import Policy


class PatchEmbed(nnx.Module):
    """Non-overlapping patches to tokens in raster order: a convolution with kernel = stride = patch, as one product.

    The kernel [patch * patch * channels, width] is an HWIO convolution kernel, flattened.
    """

    def __init__(self, patch: int, channels: int, width: int, policy: Policy, rngs: nnx.Rngs):
        self.patch = patch
        self.proj = Linear(patch * patch * channels, width, policy, rngs)

    def __call__(self, x_BHWC: jax.Array, keep_BK: jax.Array | None = None) -> jax.Array:
        """All tokens [B, N, D], or [B, K, D], only those of the patches that `keep_BK` names."""
        patch_BNP = patchify(x_BHWC, self.patch)
        return self.proj(take_tokens(patch_BNP, keep_BK))


def patchify(x_BHWC: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] -> [B, N, patch * patch * C], patches in raster order, each flattened as (row, column, channel)."""
    B, H, W, C = x_BHWC.shape
    if H % patch or W % patch:
        raise ValueError(f"image {H}x{W} does not divide into patches of {patch}")
    x = x_BHWC.reshape(B, H // patch, patch, W // patch, patch, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, patch * patch * C)


def sincos_2d(rows: int, cols: int, width: int) -> np.ndarray:
    """Fixed 2-D sine-cosine positions, float32 [rows * cols, width] (docs/papers/ijepa.md 1.3).

    The first half of the features encodes the column, the second the row; each half is all sines, then all cosines, at
    frequencies 10000^(-k / (width / 4)). Built in float64.
    """
    if width % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, got {width}")
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, col = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    parts = [f(p.reshape(-1, 1) * omega) for p in (col, row) for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)
