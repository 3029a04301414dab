"""The predictor: a narrow ViT that fills target positions from context tokens (docs/papers/ijepa.md 1.4).

Legend: B batch, M target blocks, C context tokens, T tokens of a target block, D encoder width, P predictor width.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

from common.nn import ops
from common.nn.embed import sincos_2d
from common.nn.layers import INIT, Block, LayerNorm, Linear, Wanted, take_tokens
from common.nn.module import Module, Params, define, init_stack
from common.nn.ops import Policy
from jepa.config import ViTConfig
from jepa.encoder import rescale_by_depth, run_blocks


@dataclass(frozen=True)
class Predictor:
    """Each target block is a sequence of its own, [context ; mask tokens]: blocks never see each other.

    Attributes:
      position_noise: sigma of StoP's noise on the mask tokens' positions (docs/papers/ijepa.md 6.1): the mask token
        becomes A n + position + shared token, with n ~ N(0, sigma^2 I) and A the input projection. 0: none.
    """

    config: ViTConfig
    policy: Policy = Policy()
    position_noise: float = 0.0

    @cached_property
    def _parts(self) -> dict[str, Module]:
        c, policy = self.config, self.policy
        heads, hidden = c.predictor_heads or c.heads, 4 * c.predictor_width
        return {
            "embed": define(lambda rngs: Linear(c.width, c.predictor_width, policy, rngs)),
            "block": define(lambda rngs: Block(c.predictor_width, heads, hidden, policy, rngs)),
            "norm": define(lambda rngs: LayerNorm(c.predictor_width, policy, rngs)),
            "proj": define(lambda rngs: Linear(c.predictor_width, c.width, policy, rngs)),
        }

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters {"embed", "mask_token" [P], "blocks" (stacked), "norm", "proj"}."""
        k_embed, k_token, k_blocks, k_norm, k_proj = jax.random.split(key, 5)
        blocks = init_stack(self._parts["block"], self.config.predictor_depth, k_blocks)
        return {
            "embed": self._parts["embed"].init(k_embed),
            "mask_token": INIT(k_token, (self.config.predictor_width,), jnp.float32),
            "blocks": rescale_by_depth(blocks) if self.config.depth_rescale else blocks,
            "norm": self._parts["norm"].init(k_norm),
            "proj": self._parts["proj"].init(k_proj),
        }

    def __call__(
        self,
        params: Params,
        z_BCD: jax.Array,
        context_BC: jax.Array,
        targets_BMT: jax.Array,
        context_lengths_B: jax.Array | None = None,
        target_lengths_BM: jax.Array | None = None,
        noise_BMTD: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts the targets' features from encoded context.

        Args:
          z_BCD: the encoder's context tokens; context_BC their grid indices.
          targets_BMT: grid indices of the M target blocks.
          context_lengths_B, target_lengths_BM: how many of these there are; the rest is padding. None: no padding.
          noise_BMTD: StoP's noise (see `noise`); None turns it off.

        Returns:
          Predictions [B, M, T, D]. Those at padding are meaningless.
        """
        (B, M, T), C, P = targets_BMT.shape, context_BC.shape[1], self.config.predictor_width
        position_NP = jnp.asarray(sincos_2d(*self.config.grid, P))
        context_BCP = self._parts["embed"](params["embed"], z_BCD) + position_NP[context_BC]
        masks_BMTP = jax.lax.broadcast_to_rank(params["mask_token"], 4) + position_NP[targets_BMT]
        if noise_BMTD is not None:
            masks_BMTP += ops.dense(self.policy, noise_BMTD, params["embed"]["kernel"])

        context_BMCP = jnp.broadcast_to(context_BCP[:, None], (B, M, C, P))
        x = jnp.concatenate([context_BMCP, masks_BMTP], axis=2).reshape(B * M, C + T, P)
        order, lengths, targets = _without_gap(context_lengths_B, target_lengths_BM, (B, M, C, T))
        x = take_tokens(x, order)
        x = run_blocks(
            self._parts["block"], params["blocks"], x, lengths, self.policy, wanted=targets
        )
        x = self._parts["norm"](params["norm"], x)
        return self._parts["proj"](params["proj"], x).reshape(B, M, T, -1)

    def noise(self, key: jax.Array | None, targets_BMT: jax.Array) -> jax.Array | None:
        """StoP's noise for a batch, [B, M, T, D]; None without a sigma or key."""
        if not self.position_noise or key is None:
            return None
        return self.position_noise * jax.random.normal(key, (*targets_BMT.shape, self.config.width))


def _without_gap(
    context_lengths_B: jax.Array | None,
    target_lengths_BM: jax.Array | None,
    sizes: tuple[int, int, int, int],
) -> tuple[jax.Array | None, jax.Array | None, Wanted]:
    """How the joined sequences [B * M, C + T] keep all padding at the end: the order of their tokens (None: as they are),
    how many come before the padding (None: all), and where the targets then are."""
    B, M, C, T = sizes
    if context_lengths_B is None:
        lengths = None if target_lengths_BM is None else C + target_lengths_BM.reshape(-1)
        return None, lengths, T
    begin = jnp.repeat(context_lengths_B, M)[:, None]  # of the targets
    place = jnp.arange(C + T)[None]
    order = jnp.where(
        place < begin, place, jnp.where(place < begin + T, place - begin + C, place - T)
    )
    lengths = T if target_lengths_BM is None else target_lengths_BM.reshape(-1, 1)
    return order, (begin + lengths)[:, 0], begin + jnp.arange(T)[None]
