"""The predictor: a narrow ViT that fills target positions from context tokens (docs/papers/ijepa.md 1.4).

Legend: B batch, M target blocks, C context tokens, T tokens of a target block, D encoder width, P predictor width.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

from common.nn.embed import sincos_2d
from common.nn.layers import INIT, Block, LayerNorm, Linear
from common.nn.module import Module, Params, define, init_stack
from common.nn.policy import Policy
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

    @property
    def hidden(self) -> int:
        """The width of the MLPs' hidden layer."""
        return 4 * self.config.predictor_width

    @cached_property
    def _parts(self) -> dict[str, Module]:
        c, policy = self.config, self.policy
        heads, hidden = c.predictor_heads or c.heads, self.hidden
        return {
            "embed": define(lambda rngs: Linear(c.width, c.predictor_width, policy, rngs)),
            "block": define(lambda rngs: Block(c.predictor_width, heads, hidden, policy, rngs)),
            "norm": define(lambda rngs: LayerNorm(c.predictor_width, rngs=rngs)),
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
        context_valid_BC: jax.Array | None = None,
        target_valid_BMT: jax.Array | None = None,
        noise_BMTD: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts the targets' features from encoded context.

        Args:
          z_BCD: the encoder's context tokens; context_BC their grid indices.
          targets_BMT: grid indices of the M target blocks.
          context_valid_BC, target_valid_BMT: False marks padding, which nothing attends to. None: no padding.
          noise_BMTD: StoP's noise (see `noise`); None turns it off.

        Returns:
          Predictions [B, M, T, D]. Those at padding are meaningless.
        """
        (B, M, T), C, P = targets_BMT.shape, context_BC.shape[1], self.config.predictor_width
        position_NP = jnp.asarray(sincos_2d(*self.config.grid, P))
        context_BCP = self._parts["embed"](params["embed"], z_BCD) + position_NP[context_BC]
        masks_BMTP = params["mask_token"] + position_NP[targets_BMT]
        if noise_BMTD is not None:
            masks_BMTP += self.policy.dense(noise_BMTD, params["embed"]["kernel"])

        context_BMCP = jnp.broadcast_to(context_BCP[:, None], (B, M, C, P))
        x = jnp.concatenate([context_BMCP, masks_BMTP], axis=2).reshape(B * M, C + T, P)
        valid = _joint_validity(context_valid_BC, target_valid_BMT, B, M, C, T)
        x = run_blocks(self._parts["block"], params["blocks"], x, valid, self.policy, wanted=T)
        x = self._parts["norm"](params["norm"], x)
        return self._parts["proj"](params["proj"], x).reshape(B, M, T, -1)

    def noise(self, key: jax.Array | None, targets_BMT: jax.Array) -> jax.Array | None:
        """StoP's noise for a batch, [B, M, T, D]; None without a sigma or key."""
        if not self.position_noise or key is None:
            return None
        return self.position_noise * jax.random.normal(key, (*targets_BMT.shape, self.config.width))


def _joint_validity(context_valid_BC, target_valid_BMT, B, M, C, T) -> jax.Array | None:
    """Key validity [B * M, C + T] of the joined sequences, or None when nothing is padded."""
    if context_valid_BC is None and target_valid_BMT is None:
        return None
    context = True if context_valid_BC is None else context_valid_BC[:, None, :]
    targets = True if target_valid_BMT is None else target_valid_BMT
    return jnp.concatenate(
        [jnp.broadcast_to(context, (B, M, C)), jnp.broadcast_to(targets, (B, M, T))], axis=2
    ).reshape(B * M, C + T)
