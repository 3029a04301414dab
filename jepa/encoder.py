"""The Vision Transformer encoder (docs/papers/ijepa.md 1.3).

Legend: B batch, N tokens of the grid, K kept tokens, D width, H/W/C image height, width, channels, L layers.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

from common.nn import ops
from common.nn.embed import PatchEmbed, sincos_2d
from common.nn.layers import Block, LayerNorm, Wanted
from common.nn.module import Module, Params, define, init_stack, scan_stack
from common.nn.ops import Policy
from jepa.config import ViTConfig


@dataclass(frozen=True)
class Encoder:
    """Patches + positions -> (only the kept tokens) -> pre-norm blocks -> LayerNorm. No class token."""

    config: ViTConfig
    policy: Policy = Policy()

    @cached_property
    def _parts(self) -> dict[str, Module]:
        c, policy = self.config, self.policy
        return {
            "patch": define(lambda rngs: PatchEmbed(c.patch, c.channels, c.width, policy, rngs)),
            "block": define(lambda rngs: Block(c.width, c.heads, c.hidden, policy, rngs)),
            "norm": define(lambda rngs: LayerNorm(c.width, policy, rngs)),
        }

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters {"patch", "blocks" (stacked on a leading layer axis), "norm"}."""
        k_patch, k_blocks, k_norm = jax.random.split(key, 3)
        blocks = init_stack(self._parts["block"], self.config.depth, k_blocks)
        return {
            "patch": self._parts["patch"].init(k_patch),
            "blocks": rescale_by_depth(blocks) if self.config.depth_rescale else blocks,
            "norm": self._parts["norm"].init(k_norm),
        }

    def embed(
        self, params: Params, x_BHWC: jax.Array, keep_BK: jax.Array | None = None
    ) -> jax.Array:
        """Patch tokens with their positions, [B, N, D], or [B, K, D] when only `keep_BK` is kept."""
        if x_BHWC.shape[1:] != (*self.config.image, self.config.channels):
            raise ValueError(
                f"the encoder is built for images {(*self.config.image, self.config.channels)}, got "
                f"{x_BHWC.shape[1:]}; resize them, or set model.image"
            )
        position = self.config.position_scale * sincos_2d(*self.config.grid, self.config.width)
        position = position[None] if keep_BK is None else jnp.asarray(position)[keep_BK]
        return self._parts["patch"](params["patch"], x_BHWC, keep_BK) + position

    def __call__(
        self,
        params: Params,
        x_BHWC: jax.Array,
        keep_BK: jax.Array | None = None,
        lengths_B: jax.Array | None = None,
        wanted_BK: jax.Array | None = None,
    ) -> jax.Array:
        """Encodes normalised images [B, H, W, C] to tokens [B, N, D], or [B, K, D] when only `keep_BK` is kept.

        Dropped tokens leave before they are embedded, so they never enter attention. `lengths_B`: how many of `keep_BK`
        there are; nothing attends to the padding after them. `wanted_BK`: of the tokens that are encoded, the ones to
        return; the last block computes only these.
        """
        x_BND = self.embed(params, x_BHWC, keep_BK)
        x_BND = self._run(params["blocks"], x_BND, lengths_B, wanted_BK)
        return self._parts["norm"](params["norm"], x_BND)

    def frozen(
        self, params: Params, x_BHWC: jax.Array, wanted_BK: jax.Array | None = None
    ) -> jax.Array:
        """All tokens [B, N, D], or those wanted [B, K, D], seen in the whole image. No gradient flows through them."""

        def encode(x_BHWC, wanted_BK):
            return self(params, x_BHWC, wanted_BK=wanted_BK)

        return jax.lax.stop_gradient(ops.each_example(self.policy, encode, x_BHWC, wanted_BK))

    def layers(self, params: Params, x_BHWC: jax.Array, last: int = 4) -> jax.Array:
        """The outputs of the last `last` blocks, each through the final norm: [last, B, N, D]. Probes read these."""
        if not 1 <= last <= self.config.depth:
            raise ValueError(f"cannot take the last {last} of {self.config.depth} layers")
        x_BND = self.embed(params, x_BHWC)
        split = self.config.depth - last
        if split:
            x_BND = self._run(jax.tree.map(lambda p: p[:split], params["blocks"]), x_BND)
        outputs = []
        for i in range(split, self.config.depth):
            x_BND = self._run(jax.tree.map(lambda p, i=i: p[i : i + 1], params["blocks"]), x_BND)
            outputs.append(self._parts["norm"](params["norm"], x_BND))
        return jnp.stack(outputs)

    def _run(
        self,
        blocks: Params,
        x_BND: jax.Array,
        lengths_B: jax.Array | None = None,
        wanted_BK: jax.Array | None = None,
    ) -> jax.Array:
        return run_blocks(self._parts["block"], blocks, x_BND, lengths_B, self.policy, wanted_BK)


def run_blocks(
    block: Module,
    stacked: Params,
    x_BND: jax.Array,
    lengths_B: jax.Array | None,
    policy: Policy,
    wanted: Wanted = None,
) -> jax.Array:
    """The stack of blocks over tokens, under the policy's loop layout and rematerialisation.

    `wanted`: the tokens to return; the final block computes only these.
    """
    depth = jax.tree.leaves(stacked)[0].shape[0]

    def run(stacked: Params, x_BND: jax.Array, wanted: Wanted) -> jax.Array:
        return scan_stack(
            lambda p, x: policy.constrain(block(p, x, lengths_B, wanted)),
            stacked,
            x_BND,
            unroll=policy.blocks_per_turn(depth),
            remat=policy.remat,
        )

    x_BND = policy.constrain(x_BND)
    if wanted is None:
        return run(stacked, x_BND, None)
    before, final = (
        jax.tree.map(lambda p, part=part: p[part], stacked)
        for part in (slice(depth - 1), slice(depth - 1, depth))
    )
    return run(final, run(before, x_BND, None), wanted)


def rescale_by_depth(blocks: Params) -> Params:
    """Divides the attention output and second MLP matrix of block l (1-based) by sqrt(2 l)."""

    def rescale(path, p):
        names = [k.key for k in path]
        if names in (["attention", "out", "kernel"], ["mlp", "down", "kernel"]):
            return p / jnp.sqrt(2.0 * jnp.arange(1, p.shape[0] + 1))[:, None, None]
        return p

    return jax.tree_util.tree_map_with_path(rescale, blocks)
