"""Numbers in 8 bits, a scale for each vector: the ring's keys and values, and weights."""

import jax
import jax.numpy as jnp


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [..., K] and float32 scale [...]: the largest feature of each vector becomes 127."""
    scale = jnp.max(jnp.abs(x), -1).astype(jnp.float32) / 127
    safe = jnp.where(scale == 0, 1, scale)[..., None].astype(x.dtype)
    return jnp.round(x / safe).astype(jnp.int8), scale
