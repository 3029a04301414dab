"""What sinks does otherwise on one machine than on another, and why. No other file but kernel.py names a backend.

Legend: N tokens, D inputs, F outputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike

from common.nn import cpu

FEW = 8  # tokens up to which a product is bound by reading its weights


def platform(arrays: Any = ()) -> str:
    """What the next program is built for, "cpu", "gpu" or "tpu": the mesh in force, else the devices of `arrays` (a tree),
    else JAX's default."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device.platform
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
            return next(iter(leaf.devices())).platform
    return jax.default_backend()


def stacks_blocks(params: Any = ()) -> bool:
    """Whether blocks lie on one leading axis, for `lax.scan`: not on a CPU, where slicing a block out of it copies it."""
    return platform(params) != "cpu"


def chat_weights() -> str:
    """How chat keeps its weights: in 8 bits on a CPU, where a token takes the time of reading them; float32 elsewhere."""
    return "int8" if platform() == "cpu" else "float32"


def fused_or_plain(fused: Callable[[], jax.Array], plain: Callable[[], jax.Array]) -> jax.Array:
    """`fused`, which calls sinks/kernel.py, in programs for TPUs; `plain` in all others.

    It is chosen when the program is compiled, so that one compiled here for another machine has that machine's form.
    """
    return jax.lax.platform_dependent(tpu=fused, default=plain)


def times(x_ND: jax.Array, w_DF: jax.Array) -> jax.Array:
    """x w, [N, F], in float32 at least; x takes w's type."""
    return _product((1, 0), _cast(x_ND, w_DF.dtype), w_DF)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(over: tuple[int, int], a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of two matrices of one type, which sums over axis over[0] of a and over[1] of b, in float32 at least.

    The products of its derivative round to the operands' type. Left to itself, reverse mode would multiply a float32
    cotangent with a bfloat16 operand, at the rate of float32.
    """
    return _dot(over, a, b, jnp.promote_types(a.dtype, jnp.float32))


@_product.defjvp
def _product_jvp(over, primals, tangents):
    (a, b), (da, db) = primals, tangents
    y = _product(over, a, b)
    return y, (_dot(over, da, b, a.dtype) + _dot(over, a, db, a.dtype)).astype(y.dtype)


def _dot(over: tuple[int, int], a: jax.Array, b: jax.Array, out: DTypeLike) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype in (jnp.float32, jnp.float64) else None
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=out, precision=precision)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _cast(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x.astype(dtype). XLA's CPU backend rounds to bfloat16 at half the rate of the integers that cpu.rounded computes."""
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    on_cpu = partial(cpu.rounded, dtype="bfloat16")
    return jax.lax.platform_dependent(x, cpu=on_cpu, default=lambda x: x.astype(dtype))


@_cast.defjvp
def _cast_jvp(dtype, primals, tangents):
    return _cast(*primals, dtype), tangents[0].astype(dtype)


def times_rows(x_ND: jax.Array, w_FD: jax.Array, scale_F: jax.Array | None) -> jax.Array:
    """x (w scale)^T, [N, F], with the weights read as they lie; in float32 at least. No scale is 1.

    For a few tokens the time is that of reading the weights, and they are the left operand. XLA's CPU backend has fast
    products below float32 only where the right operand has two columns or more, and otherwise converts all weights to
    float32 first. So a lone token gets columns of zeros next to it, or in int8 what its rounding left over.
    """
    N = len(x_ND)
    if scale_F is not None and N <= FEW:
        peak_N1 = jnp.max(jnp.abs(x_ND), 1, keepdims=True) / 127
        fine_ND = x_ND / jnp.where(peak_N1 == 0, 1, peak_N1)
        whole_ND = jnp.round(fine_ND)  # [-127, 127], as is what it leaves over, times 254
        columns = jnp.concatenate([whole_ND, jnp.round((fine_ND - whole_ND) * 254)])
        y_FN = _dot((1, 1), w_FD, columns.astype(jnp.int8), jnp.int32).astype(jnp.float32)
        return (y_FN[:, :N] + y_FN[:, N:] / 254).T * peak_N1 * scale_F
    if scale_F is not None:
        w_FD = w_FD.astype(jnp.bfloat16)  # exact
    x_ND = x_ND.astype(w_FD.dtype)
    if N > FEW:
        y_NF = _product((1, 1), x_ND, w_FD)
        return y_NF if scale_F is None else y_NF * scale_F
    if w_FD.dtype == jnp.bfloat16:
        x_ND = jnp.pad(x_ND, ((0, max(0, 2 - N)), (0, 0)))
    return _product((1, 1), w_FD, x_ND)[:, :N].T
