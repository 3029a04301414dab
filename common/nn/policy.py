"""One precision-and-layout policy for every contraction of every model.

Matrix units take bfloat16 operands and accumulate in float32 (TPU MXU, NVIDIA tensor cores, x86 AMX). `dense` and
`attention` (attention.py) say exactly that, in the forward *and* the backward pass: without their own rules, reverse
mode would multiply a float32 cotangent with a bfloat16 operand, which runs at the float32 rate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

# Of a layer's activations, what a CPU had better not exceed: they then stay in its caches.
CACHE_BYTES = 8 << 20


@dataclass(frozen=True)
class Policy:
    """How models compute. Parameters, residual stream, norms, softmax and losses are always float32.

    Attributes:
      compute: operand type of contractions, "bfloat16" or "float32". Accumulation is float32.
      remat: recompute each block's activations in the backward pass (large models).
      unroll: blocks per turn of the depth loop; 0 takes the whole depth on CPU, where slicing parameters out of
        the stack costs a copy, and 1 on accelerators, where program size matters more.
      batch_axes: mesh axes over which activations' leading axis is split; () leaves sharding to the compiler.
    """

    compute: str = "bfloat16"
    remat: bool = False
    unroll: int = 0
    batch_axes: tuple[str, ...] = ()

    def __post_init__(self):
        if self.compute not in ("bfloat16", "float32"):
            raise ValueError(f"policy.compute={self.compute!r}: must be 'bfloat16' or 'float32'")
        if self.unroll < 0:
            raise ValueError(f"policy.unroll={self.unroll}: 0 (automatic) or a positive count")

    def blocks_per_turn(self, depth: int) -> int:
        """Blocks laid out per loop turn for a stack of `depth` blocks."""
        if self.unroll:
            return min(self.unroll, depth)
        return depth if jax.default_backend() == "cpu" else 1

    def constrain(self, x: jax.Array) -> jax.Array:
        """Pins an activation's leading axis to the batch's mesh axes: weights move instead of activations."""
        if not self.batch_axes:
            return x
        spec = jax.P(self.batch_axes, *[jax.P.UNCONSTRAINED] * (x.ndim - 1))
        return lax.with_sharding_constraint(x, spec)

    def in_groups(self, f: Callable, x: jax.Array, bytes_each: int) -> jax.Array:
        """`f(x)` for an `f` that takes examples along the leading axis one by one, without a gradient.

        A CPU takes as many at once as its caches hold, where `bytes_each` is the largest activation of one.
        """
        at_once = _fitting(len(x), bytes_each)
        if at_once == len(x):
            return f(x)
        y = lax.map(f, x.reshape(-1, at_once, *x.shape[1:]))
        return y.reshape(-1, *y.shape[2:])

    def sum_in_groups(
        self, f: Callable, params: Any, x: Any, given: Any, bytes_each: int
    ) -> jax.Array:
        """`f(params, x, given)`, a scalar that sums over the examples along the leading axis of all of `x` and `given`.

        A CPU takes as many at once as its caches hold (see `in_groups`) and, where a gradient is asked for, computes that
        of a group with its value, while the activations are still there. Gradients are of `params` and `x`.
        """
        size = len(jax.tree.leaves(x)[0])
        at_once = _fitting(size, bytes_each)
        if at_once == size:
            return f(params, x, jax.lax.stop_gradient(given))
        return _sum_in_groups(f, at_once, params, x, given)

    def dense(self, x: jax.Array, w_DF: jax.Array, b_F: jax.Array | None = None) -> jax.Array:
        """x [..., D] times w [D, F], plus b [F] if given, in float32 [..., F]."""
        y_NF = _dense(self.compute, x.reshape(-1, x.shape[-1]), w_DF, b_F)
        return y_NF.reshape(*x.shape[:-1], w_DF.shape[-1])


def _fitting(size: int, bytes_each: int) -> int:
    """How many of `size` examples to take at once: all, or on a lone CPU device a divisor whose activations fit."""
    if jax.default_backend() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
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


def _dot(compute: str, a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """The product of two matrices that sums over axis over[0] of a and over[1] of b."""
    precision = lax.Precision.HIGHEST if compute == "float32" else None
    return lax.dot_general(
        a.astype(compute),
        b.astype(compute),
        (((over[0],), (over[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(compute: str, x_ND: jax.Array, w_DF: jax.Array, b_F: jax.Array | None) -> jax.Array:
    return _dense_fwd(compute, x_ND, w_DF, b_F)[0]


def _dense_fwd(compute, x_ND, w_DF, b_F):
    # The operands are kept as they were used: half the memory of float32.
    x, w = rounded(x_ND, compute), rounded(w_DF, compute)
    y_NF = _dot(compute, x, w, (1, 0))
    like = jax.tree.map(lambda p: jnp.zeros((), p.dtype), (x_ND, w_DF, b_F))
    return (y_NF if b_F is None else y_NF + b_F), (x, w, like)


def _dense_bwd(compute, residuals, g_NF):
    x, w, (like_x, like_w, like_b) = residuals
    # One copy of the cotangent as all three take it, instead of a cast fused into each.
    g = lax.optimization_barrier(rounded(g_NF, compute))
    dx_ND = _dot(compute, g, w, (1, 1))
    if compute == "float32":
        dw_DF = _dot(compute, x, g, (0, 0))
    else:
        dw_DF = lax.platform_dependent(x, g, cpu=_weight_gradient_cpu, default=_weight_gradient)
    db_F = None if like_b is None else g.sum(0, dtype=jnp.float32).astype(like_b.dtype)
    return dx_ND.astype(like_x.dtype), dw_DF.astype(like_w.dtype), db_F


_dense.defvjp(_dense_fwd, _dense_bwd)


def _weight_gradient(x_ND: jax.Array, g_NF: jax.Array) -> jax.Array:
    return _dot("bfloat16", x_ND, g_NF, (0, 0))


def _weight_gradient_cpu(x_ND: jax.Array, g_NF: jax.Array) -> jax.Array:
    """x^T g as XLA's CPU backend multiplies fast: with a left operand that is summed over its last axis.

    The transpose must be a copy: left to itself, XLA folds it back into the slow product. It costs least on the narrower
    operand.
    """
    if x_ND.shape[1] > g_NF.shape[1]:
        return lax.optimization_barrier(_weight_gradient_cpu(g_NF, x_ND)).T
    return _dot("bfloat16", laid_out(x_ND.T), g_NF, (1, 0))


def fenced(x: jax.Array) -> jax.Array:
    """`x`, on CPU computed once and kept: XLA would fuse how it is computed into each of its uses.

    Holds in a jit with `compiler_options()`.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def laid_out(x: jax.Array) -> jax.Array:
    """`x`, on CPU in memory in the order of its axes, and `fenced`: XLA would fold a transpose into the product that
    takes it, which then is slow."""

    def copied(x: jax.Array) -> jax.Array:
        return fenced(with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))))

    return lax.platform_dependent(x, cpu=copied, default=lambda x: x)


@jax.custom_vjp
def fenced_gradient(x: jax.Array) -> jax.Array:
    """`x`, whose gradient is `fenced`. For the residual stream, where all blocks' gradients add up.

    XLA's CPU backend would otherwise, at every block, add up anew what all later blocks contribute.
    """
    return x


fenced_gradient.defvjp(lambda x: (x, None), lambda _, g: (fenced(g),))


def compiler_options() -> dict[str, str] | None:
    """For the jit of a training step on CPU: optimization barriers hold, which XLA otherwise drops before it fuses, and
    loops take the widest vectors that the processor has."""
    if jax.default_backend() != "cpu":
        return None
    return {
        "xla_disable_hlo_passes": "cse_barrier_expander",
        "xla_cpu_prefer_vector_width": "512",
    }
