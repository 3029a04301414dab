"""One precision-and-layout policy for every contraction of every model.

Matrix units take bfloat16 operands and accumulate in float32 (TPU MXU, NVIDIA tensor cores, x86 AMX). `dense` and
`attention` (attention.py) say exactly that, in the forward *and* the backward pass: without their own rules, reverse
mode would multiply a float32 cotangent with a bfloat16 operand, which runs at the float32 rate.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from common.nn.cpu import column_parts, rounded, transposed


@dataclass(frozen=True)
class Policy:
    """How models compute. Parameters, residual stream, norms, softmax and losses are always float32.

    Attributes:
      compute: operand type of contractions, "bfloat16" or "float32". Accumulation is float32.
      remat: whether each block's activations are computed again in the backward pass (large models).
      unroll: blocks per turn of the depth loop; None takes the whole depth on CPU, where slicing parameters out of
        the stack costs a copy, and 1 on accelerators, where program size matters more.
      batch_axes: mesh axes over which activations' leading axis is split; () leaves sharding to the compiler.
    """

    compute: str = "bfloat16"
    remat: bool = False
    unroll: int | None = None
    batch_axes: tuple[str, ...] = ()

    def __post_init__(self):
        if self.compute not in ("bfloat16", "float32"):
            raise ValueError(f"policy.compute={self.compute!r}: must be 'bfloat16' or 'float32'")
        if self.unroll is not None and self.unroll < 1:
            raise ValueError(f"policy.unroll={self.unroll}: None (automatic) or a positive count")

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

    def dense(self, x: jax.Array, w_DF: jax.Array, b_F: jax.Array | None = None) -> jax.Array:
        """x [..., D] times w [D, F], plus b [F] if given, in float32 [..., F]."""
        y_NF: jax.Array = _dense(self.compute, x.reshape(-1, x.shape[-1]), w_DF, b_F)
        return y_NF.reshape(*x.shape[:-1], w_DF.shape[-1])

    def dense_parts(
        self, x: jax.Array, w_DF: jax.Array, b_F: jax.Array, parts: int
    ) -> list[jax.Array]:
        """`dense` in equal parts of its features, each [..., F / parts]: a product each where `column_parts` splits w."""
        if column_parts(*w_DF.shape) == 1:
            return jnp.split(self.dense(x, w_DF, b_F), parts, axis=-1)
        columns = zip(jnp.split(w_DF, parts, axis=1), jnp.split(b_F, parts))
        return [self.dense(x, w, b) for w, b in columns]


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
    return _dot("bfloat16", transposed(x_ND), g_NF, (1, 0))
