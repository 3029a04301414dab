"""From logits to the next token. Legend: B batch, V vocabulary."""

from dataclasses import dataclass
from numbers import Integral

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: logits are divided by it, 1e-4 to 1e4; 0 takes the likeliest token.
      top_k: only among the k likeliest; 0: among all.
      top_p: only among the likeliest that together reach this probability (nucleus sampling); 1: among all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not (self.temperature == 0 or 1e-4 <= self.temperature <= 1e4):
            raise ValueError(f"temperature={self.temperature}: 0 (greedy), or from 1e-4 to 1e4")
        if not isinstance(self.top_k, Integral) or not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k={self.top_k}: a whole number, 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: in (0, 1], 1 is off")


def sample(logits_BV: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """One token per row, int32 [B]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        kth_B = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1]
        logits_BV = jnp.where(logits_BV < kth_B[:, None], -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, -1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, -1)
        # A token stays while those before it have not reached top_p: the likeliest always does.
        kept_BV = jnp.cumsum(p_BV, -1) - p_BV < sampling.top_p
        least_B = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), -1)
        logits_BV = jnp.where(logits_BV < least_B[:, None], -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)
