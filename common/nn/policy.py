"""One precision-and-layout policy for every contraction of every model.

Matrix units take bfloat16 operands and accumulate in float32 (TPU MXU, NVIDIA tensor cores, x86 AMX). `dense` and
`attention` (attention.py) say exactly that, in the forward *and* the backward pass: without their own rules, reverse
mode would multiply a float32 cotangent with a bfloat16 operand, which runs at the float32 rate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
        """`f(x)` for an `f` that takes examples along the leading axis one by one.

        A CPU takes as many at once as its caches hold, where `bytes_each` is the largest activation of one. Meant for passes
        without a gradient: for one, everything would be kept and leave the caches all the same.
        """
        if jax.default_backend() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
            return f(x)
        size = len(x)
        fitting = [n for n in range(1, size + 1) if size % n == 0 and n * bytes_each <= CACHE_BYTES]
        at_once = max(fitting, default=size)
        if at_once == size:
            return f(x)
        y = lax.map(f, x.reshape(size // at_once, at_once, *x.shape[1:]))
        return y.reshape(size, *y.shape[2:])

    def cast(self, x: jax.Array) -> jax.Array:
        """`x` as contractions take it. Cast before moving data about: it halves what moves."""
        return x.astype(self.compute)

    def dense(self, x: jax.Array, w_DF: jax.Array) -> jax.Array:
        """x [..., D] times w [D, F], in float32 [..., F]."""
        y_NF = _dense(self.compute, x.reshape(-1, x.shape[-1]), w_DF)
        return y_NF.reshape(*x.shape[:-1], w_DF.shape[-1])


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
def _dense(compute: str, x_ND: jax.Array, w_DF: jax.Array) -> jax.Array:
    return _dot(compute, x_ND, w_DF, (1, 0))


def _dense_fwd(compute, x_ND, w_DF):
    # The operands are kept as they were used: half the memory of float32.
    x, w = x_ND.astype(compute), w_DF.astype(compute)
    return _dense(compute, x, w), (x, w, jnp.zeros((), x_ND.dtype), jnp.zeros((), w_DF.dtype))


def _dense_bwd(compute, residuals, g_NF):
    x, w, like_x, like_w = residuals
    # The barrier keeps one copy of the cotangent as the two products take it, instead of a cast fused into each.
    g = lax.optimization_barrier(g_NF.astype(compute))
    dx_ND = _dot(compute, g, w, (1, 1))
    if compute == "float32":
        dw_DF = _dot(compute, x, g, (0, 0))
    else:
        dw_DF = lax.platform_dependent(x, g, cpu=_weight_gradient_cpu, default=_weight_gradient)
    return dx_ND.astype(like_x.dtype), dw_DF.astype(like_w.dtype)


_dense.defvjp(_dense_fwd, _dense_bwd)


def _weight_gradient(x_ND: jax.Array, g_NF: jax.Array) -> jax.Array:
    return _dot("bfloat16", x_ND, g_NF, (0, 0))


def _weight_gradient_cpu(x_ND: jax.Array, g_NF: jax.Array) -> jax.Array:
    """x^T g as XLA's CPU backend multiplies fast: with a left operand that is summed over its last axis.

    The layout makes the transpose a copy: left to itself, XLA folds it back into the slow product. It costs least on the
    narrower operand.
    """
    if x_ND.shape[1] > g_NF.shape[1]:
        return lax.optimization_barrier(_weight_gradient_cpu(g_NF, x_ND)).T
    x_DN = with_layout_constraint(x_ND.T, Layout(major_to_minor=(0, 1)))
    return _dot("bfloat16", x_DN, g_NF, (1, 0))


@jax.custom_vjp
def computed_once(x: jax.Array) -> jax.Array:
    """`x`, whose gradient is computed once where it is used many times: the residual stream's.

    XLA's CPU backend would fuse the sum that is that gradient into each of its uses, and so, at every block, add up anew
    what all later blocks contribute.
    """
    return x


def _once(_, g: jax.Array) -> tuple[jax.Array]:
    return (lax.platform_dependent(g, cpu=lax.optimization_barrier, default=lambda g: g),)


computed_once.defvjp(lambda x: (x, None), _once)


def compiler_options() -> dict[str, str] | None:
    """For the jit of a training step: keeps optimization barriers on CPU, where XLA drops them before it fuses."""
    if jax.default_backend() != "cpu":
        return None
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}
