"""Schedules as functions of the update count, 0 at the first update (docs/papers/ijepa.md 1.6).

Each is an optax schedule: it takes an int32 array or a Python int and returns a float32 scalar.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Schedule = Callable[[ArrayLike], jax.Array]  # an optax.Schedule


def warmup_cosine(start: float, peak: float, final: float, warmup: int, total: int) -> Schedule:
    """Linear from `start` to `peak` over `warmup` steps, then cosine to `final` at `total`.

    As in the released code the count is raised before it is read: the first update runs at 1/warmup of the ramp, the
    last of `total` exactly at `final`, and it stays there.
    """
    if not 0 <= warmup <= total:
        raise ValueError(f"warmup of {warmup} steps does not fit into {total} steps")

    def schedule(count):
        step = jnp.asarray(count, jnp.float32) + 1
        ramp = start + (peak - start) * step / max(1, warmup)
        progress = jnp.clip((step - warmup) / max(1, total - warmup), 0, 1)
        decay = final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, ramp, decay)

    return schedule


def cosine(start: float, final: float, total: int) -> Schedule:
    """Half a cosine from `start` to `final` over `total` steps; the count is raised before it is read."""

    def schedule(count):
        progress = jnp.clip((jnp.asarray(count, jnp.float32) + 1) / max(1, total), 0, 1)
        return final + (start - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    return schedule


def linear(start: float, final: float, total: int) -> Schedule:
    """Linear from exactly `start` at count 0 towards `final` at `total`."""

    def schedule(count):
        return start + (final - start) * jnp.clip(
            jnp.asarray(count, jnp.float32) / max(1, total), 0, 1
        )

    return schedule
