"""The two things that XLA's CPU compiler has to be told; on other backends they change nothing that is computed."""

from typing import Any

import jax
import jax.numpy as jnp


def kept(tree: Any) -> Any:
    """The arrays as they are, computed once: the compiler would compute a few numbers, such as the powers of b1 or
    exp(raw), again for every element of the model that they are multiplied with."""
    return jax.lax.optimization_barrier(tree)


def sum_all(x: jax.Array) -> jax.Array:
    """The sum of an array. On CPUs one number is added at a time, but matrices are multiplied in vectors."""
    if x.ndim == 0:
        return x
    ones = jnp.ones(x.shape[-1], x.dtype)
    return jax.lax.platform_dependent(x, cpu=lambda x: jnp.sum(x @ ones), default=jnp.sum)
