"""Transformer layers as flax modules, shaped for the papers' models.

Legend: B batch, N tokens, D width, F hidden width, H heads, K head width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.attention import attention
from common.nn.policy import Policy, computed_once

# Logical names of every parameter's axes, by the end of its path. Rules (common/sharding.py) map names to mesh axes.
LOGICAL_AXES = {
    "qkv/kernel": ("embed", "heads"),
    "qkv/bias": ("heads",),
    "attention/out/kernel": ("heads", "embed"),
    "mlp/up/kernel": ("embed", "mlp"),
    "mlp/up/bias": ("mlp",),
    "mlp/down/kernel": ("mlp", "embed"),
    "patch/proj/kernel": ("patch", "embed"),
    "out/bias": (None,),
    "down/bias": (None,),
    "proj/bias": (None,),
    "scale": (None,),
    "norm/bias": (None,),
    "norm1/bias": (None,),
    "norm2/bias": (None,),
}

INIT = nnx.initializers.normal(stddev=0.02)  # the released code truncates at 100 sigma: never


def linear(
    n_in: int, n_out: int, policy: Policy, rngs: nnx.Rngs, *, bias: bool = True, init=INIT
) -> nnx.Linear:
    """`nnx.Linear` with float32 parameters whose product runs under `policy`."""

    def dot_general(x, w, dims, precision=None, out_sharding=None):
        del dims, precision, out_sharding
        return policy.dense(x, w)

    return nnx.Linear(
        n_in,
        n_out,
        use_bias=bias,
        kernel_init=init,
        dot_general=dot_general,
        promote_dtype=lambda arrays, dtype=None: arrays,  # the policy casts
        rngs=rngs,
    )


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU by erf, to 1e-6: jax.nn.gelu takes erfc, whose care for the far tail doubles the time."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 2**-0.5))


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation in float32 with the ViT's epsilon."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head self-attention with biased projections (ijepa spec 1.3), scores and softmax in float32.

    `valid`: see `common.nn.attention.attention`.
    """

    def __init__(self, width: int, heads: int, policy: Policy, rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.heads = heads
        self.policy = policy
        self.qkv = linear(width, 3 * width, policy, rngs)
        self.out = linear(width, width, policy, rngs)

    def __call__(self, x_BND: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        B, N, D = x_BND.shape
        H, K = self.heads, D // self.heads
        # Cast before splitting: it halves what moves.
        qkv_BNHK = self.policy.cast(self.qkv(x_BND)).reshape(B, N, 3 * H, K)
        q_BNHK, k_BNHK, v_BNHK = jnp.split(qkv_BNHK, 3, axis=2)
        mixed_BNHK = attention(self.policy.compute, q_BNHK, k_BNHK, v_BNHK, valid)
        return self.out(mixed_BNHK.reshape(B, N, D))


class MLP(nnx.Module):
    """Two linear layers with exact GELU."""

    def __init__(self, width: int, hidden: int, policy: Policy, rngs: nnx.Rngs):
        self.up = linear(width, hidden, policy, rngs)
        self.down = linear(hidden, width, policy, rngs)

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        return self.down(gelu(self.up(x_BND)))


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)). LayerNorm eps 1e-6."""

    def __init__(self, width: int, heads: int, hidden: int, policy: Policy, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, policy, rngs)
        self.norm2 = LayerNorm(width, rngs=rngs)
        self.mlp = MLP(width, hidden, policy, rngs)

    def __call__(self, x_BND: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        x_BND = computed_once(x_BND)
        x_BND = computed_once(x_BND + self.attention(self.norm1(x_BND), valid))
        return x_BND + self.mlp(self.norm2(x_BND))
