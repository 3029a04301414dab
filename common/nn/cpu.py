"""What XLA's CPU backend needs to be fast. On accelerators all of this says what the plain code says.

How much each brings, and what was tried instead: docs/journal.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

# Bytes of a layer's activations up to which they stay in a CPU's caches.
CACHE_BYTES = 8 << 20
# Columns of a product's right operand that XLA's CPU backend takes at once.
BLOCK_BYTES = 128 << 10


def fenced(x: Any) -> Any:
    """`x`, an array or several, on CPU computed once and kept: XLA would fuse how it is computed into each of its uses.

    Holds in a jit with `compiler_options()`.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def laid_out(x: jax.Array) -> jax.Array:
    """`x`, on CPU in memory in the order of its axes, and `fenced`: XLA would fold a transpose into the product that
    takes it, which then is slow."""

    def copied(x: jax.Array) -> jax.Array:
        return fenced(with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))))

    return lax.platform_dependent(x, cpu=copied, default=lambda x: x)


def transposed(x_ND: jax.Array) -> jax.Array:
    """x^T, on CPU a copy, `laid_out`: transposed block by block, which takes half as long as all at once."""
    N, D = x_ND.shape
    if N % 64:
        return laid_out(x_ND.T)
    blocks = fenced(x_ND.reshape(N // 64, 64, D).swapaxes(1, 2))
    return laid_out(blocks.swapaxes(0, 1)).reshape(D, N)


def summed_along(x_ND: jax.Array, weight_D: jax.Array) -> jax.Array:
    """The sum of x * weight [...] over the last axis, in float32; on CPU a product with the weights, which reads x once."""
    return lax.platform_dependent(
        x_ND,
        weight_D,
        cpu=lambda x, weight: jnp.dot(x, weight, precision=lax.Precision.HIGHEST),
        default=lambda x, weight: (x * weight).sum(-1),
    )


def summed_over(x_ND: jax.Array) -> jax.Array:
    """The sum of x [D] over all axes but the last, in float32; on CPU a product with ones."""

    def product(x):
        x = x.reshape(-1, x.shape[-1])
        return jnp.dot(jnp.ones(len(x)), x, precision=lax.Precision.HIGHEST)

    tokens = tuple(range(x_ND.ndim - 1))
    return lax.platform_dependent(x_ND, cpu=product, default=lambda x: x.sum(tokens))


@jax.custom_vjp
def fenced_gradient(x: jax.Array) -> jax.Array:
    """`x`, whose gradient is `fenced`. For the residual stream, where all blocks' gradients add up.

    XLA's CPU backend would otherwise sum the contributions of all later blocks again at every block.
    """
    return x


fenced_gradient.defvjp(lambda x: (x, None), lambda _, g: (fenced(g),))


def compiler_options() -> dict[str, str] | None:
    """Options for the jit of a training step on CPU: XLA keeps optimization barriers, which it otherwise drops early, and
    loops take the widest vectors that the processor has."""
    if jax.default_backend() != "cpu":
        return None
    return {"xla_disable_hlo_passes": "cse_barrier_expander", "xla_cpu_prefer_vector_width": "512"}


def rounded(x: jax.Array, dtype: str) -> jax.Array:
    """`x` as type "bfloat16" or "float32", as contractions take it."""
    if dtype != "bfloat16" or x.dtype != jnp.float32:
        return x.astype(dtype)
    return lax.platform_dependent(x, cpu=_bfloat16_cpu, default=lambda x: x.astype(jnp.bfloat16))


@jax.custom_vjp
def _bfloat16_cpu(x: jax.Array) -> jax.Array:
    """float32 to the nearest bfloat16, ties to even, by bits: the same values as a cast (and NaN stays NaN).

    A loop that ends in XLA's own cast takes vectors of 8 numbers at most, not 16, and twice the time.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + jnp.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)


_bfloat16_cpu.defvjp(lambda x: (_bfloat16_cpu(x), None), lambda _, g: (g.astype(jnp.float32),))


def column_parts(n_in: int, n_out: int) -> int:
    """Into how many parts to split the columns of a weight [n_in, n_out], so that each core keeps the rows it computed.

    With more columns than it takes at once, XLA's CPU backend gives each core a share of the columns. The next operation
    goes by rows again, and finds most of them in another core's cache. 1 where a split gains nothing: on other backends,
    and for weights so large that the product takes long compared with the movement.
    """
    if not _on_lone_cpu():
        return 1
    fits = (p for p in range(1, 5) if n_out % p == 0 and 2 * n_in * n_out // p <= BLOCK_BYTES)
    return next(fits, 1)


def in_groups(f: Callable, x: Any, bytes_each: int) -> jax.Array:
    """`f(x)` for an `f` that takes examples along the leading axis of all of `x` one by one, without a gradient.

    A CPU takes as many at once as its caches hold, where `bytes_each` is the largest activation of one.
    """
    size = len(jax.tree.leaves(x)[0])
    at_once = _fitting(size, bytes_each)
    if at_once == size:
        return f(x)
    y = lax.map(f, _groups(at_once, x))
    return y.reshape(-1, *y.shape[2:])


def sum_in_groups(f: Callable, params: Any, x: Any, given: Any, bytes_each: int) -> jax.Array:
    """`f(params, x, given)`, a scalar that sums over the examples along the leading axis of all of `x` and `given`.

    A CPU takes as many at once as its caches hold (see `in_groups`) and, where a gradient is asked for, computes that
    of a group with its value, while the activations are still there. Gradients are of `params` and `x`.
    """
    size = len(jax.tree.leaves(x)[0])
    at_once = _fitting(size, bytes_each)
    if at_once == size:
        return f(params, x, jax.lax.stop_gradient(given))
    return _sum_in_groups(f, at_once, params, x, given)


def _on_lone_cpu() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    # A mesh says what it is made of: a program may be built on a CPU for another machine.
    built_for = mesh.abstract_device
    platform = built_for.platform if built_for is not None else jax.default_backend()
    return platform == "cpu" and mesh.size <= 1


def _fitting(size: int, bytes_each: int) -> int:
    """How many of `size` examples to take at once: all, or on a lone CPU device a divisor whose activations fit."""
    if not _on_lone_cpu():
        return size
    most = CACHE_BYTES // bytes_each
    divisors = [n for n in range(1, size + 1) if size % n == 0 and n <= most]
    # A batch that does not divide well would go through almost example by example.
    return max((n for n in divisors if 4 * n >= most), default=size)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_in_groups(f: Callable, at_once: int, params: Any, x: Any, given: Any) -> jax.Array:
    def add(total, group):
        return total + f(params, *group), None

    return lax.scan(add, jnp.zeros(()), _groups(at_once, (x, given)))[0]


def _sum_in_groups_fwd(f, at_once, params, x, given):
    def add(total, group):
        value, (d_params, d_x) = jax.value_and_grad(f, (0, 1))(params, *group)
        return jax.tree.map(jnp.add, total, (value, d_params)), d_x

    zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    (value, d_params), d_x = lax.scan(add, zero, _groups(at_once, (x, given)))
    return value, (d_params, jax.tree.map(lambda d: d.reshape(-1, *d.shape[2:]), d_x))


def _sum_in_groups_bwd(f, at_once, gradients, g):
    return *jax.tree.map(lambda d: g * d, gradients), None


_sum_in_groups.defvjp(_sum_in_groups_fwd, _sum_in_groups_bwd)


def _groups(at_once: int, examples: Any) -> Any:
    return jax.tree.map(lambda a: a.reshape(-1, at_once, *a.shape[1:]), examples)
