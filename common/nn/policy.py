"""One precision-and-layout policy for every contraction of every model.

Matrix units take bfloat16 operands and accumulate in float32 (TPU MXU, NVIDIA tensor cores, x86 AMX). `contract` says
exactly that, in the forward *and* the backward pass: without the custom rule, reverse mode would multiply a float32
cotangent with a bfloat16 operand, which runs at the float32 rate.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp


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
            raise ValueError(
                f"policy.unroll={self.unroll}: must be 0 (automatic) or a positive count"
            )

    def blocks_per_turn(self, depth: int) -> int:
        """Blocks laid out per loop turn for a stack of `depth` blocks."""
        if self.unroll:
            return min(self.unroll, depth)
        return depth if jax.default_backend() == "cpu" else 1

    def constrain(self, x: jax.Array) -> jax.Array:
        """Pins an activation's leading axis to the batch's mesh axes, so that weights move instead of activations."""
        if not self.batch_axes:
            return x
        spec = jax.P(self.batch_axes, *[jax.P.UNCONSTRAINED] * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, spec)

    def contract(self, spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        """`einsum(spec, a, b)` with this policy's operands, accumulated and returned in float32.

        `spec` names every axis ("BND,DF->BNF"); each index of an operand must appear in the other or in the result.
        """
        return _contract(spec, self.compute, a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(spec: str, compute: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if compute == "float32" else None
    return jnp.einsum(
        spec,
        a.astype(compute),
        b.astype(compute),
        preferred_element_type=jnp.float32,
        precision=precision,
    )


def _contract_fwd(spec, compute, a, b):
    # The residuals are kept as the operands were used: half the memory of float32.
    a_c, b_c = a.astype(compute), b.astype(compute)
    witness = (jnp.zeros((), a.dtype), jnp.zeros((), b.dtype))
    return _contract(spec, compute, a_c, b_c), (a_c, b_c, witness)


def _contract_bwd(spec, compute, residuals, g):
    a, b, (like_a, like_b) = residuals
    operands, out = spec.split("->")
    ia, ib = operands.split(",")
    g = g.astype(compute)
    # A product's cotangents are products: each operand is the sum over what it does not have. Calling the rule
    # itself keeps higher derivatives available.
    da = _contract(f"{out},{ib}->{ia}", compute, g, b)
    db = _contract(f"{ia},{out}->{ib}", compute, a, g)
    return da.astype(like_a.dtype), db.astype(like_b.dtype)


_contract.defvjp(_contract_fwd, _contract_bwd)
