"""What the families share: products, norms, activations. Legend: ... any leading axes, D inputs, F outputs."""

from dataclasses import dataclass, field
from itertools import accumulate

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from common.nn import ops
from common.nn.ops import Policy
from common.sharding import Axes
from sinks.int8 import quantize

FEW = 8  # tokens up to which a product is bound by reading its weights


@dataclass(frozen=True)
class Leaf:
    """One array of a layout: its shape (one block's), its logical axes, and how it starts.

    Attributes:
      init: "normal", "ones", "zeros", or "out" (a product into the residual stream: normal, scaled down by depth).
    """

    shape: tuple[int, ...]
    axes: Axes
    init: str = "normal"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Weights of one product or several with the same input, a row for each output: [F, D] where the layout says [D, F].

    Attributes:
      scale_F: of int8 weights, which are w_FD * scale_F; None for others.
      sizes: outputs of each product; their rows follow one another.
    """

    w_FD: jax.Array
    scale_F: jax.Array | None = None
    sizes: tuple[int, ...] = field(default=(), metadata={"static": True})

    def quantize(self) -> "Rows":
        """The weights in 8 bits: each row's largest becomes 127."""
        w_FD, scale_F = quantize(self.w_FD.astype(jnp.float32))
        return Rows(w_FD, scale_F, self.sizes)


def dense(x: jax.Array, w: jax.Array | Rows, bias_F: jax.Array | None = None) -> jax.Array:
    """x [..., D] times w [D, F]: [..., F] in float32. Operands take w's type: bfloat16 weights make bfloat16 products."""
    if isinstance(w, Rows):
        y = _times_rows(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)
    elif w.dtype == jnp.float64:
        y = jnp.einsum("...d,df->...f", x.astype(w.dtype), w)
    else:
        y = ops.dense(Policy(compute=w.dtype.name), x, w)
    return y if bias_F is None else y + bias_F.astype(y.dtype)


def project(x: jax.Array, p: dict, *names: str) -> list[jax.Array]:
    """x times each of the named weights, plus their biases: one product where `stream.prepare` has joined them."""
    rows = p.get("+".join(names))
    if rows is None:
        return [dense(x, p[name], p.get(f"{name}_bias")) for name in names]
    parts = jnp.split(dense(x, rows), list(accumulate(rows.sizes[:-1])), axis=-1)
    biases = (p.get(f"{name}_bias") for name in names)
    return [y if b is None else y + b.astype(y.dtype) for y, b in zip(parts, biases)]


def logits(params: dict, x: jax.Array) -> jax.Array:
    """Products with "unembed" [D, V], or where there is none with "embed" [V, D]: [..., V] in float32."""
    unembed = params.get("unembed")
    return dense(x, Rows(params["embed"]) if unembed is None else unembed)


def _times_rows(x_ND: jax.Array, rows: Rows) -> jax.Array:
    """x w^T, [N, F], with the weights read as they lie.

    For a few tokens the time is that of reading the weights, and they are the left operand. XLA's CPU backend has fast
    products below float32 only where the right operand has two columns or more, and otherwise converts all weights to
    float32 first. So a lone token gets columns of zeros next to it, or in int8 what its rounding left over.
    """
    w_FD, scale_F, N = rows.w_FD, rows.scale_F, len(x_ND)
    if scale_F is not None and N <= FEW:
        peak_N1 = jnp.max(jnp.abs(x_ND), 1, keepdims=True) / 127
        fine_ND = x_ND / jnp.where(peak_N1 == 0, 1, peak_N1)
        whole_ND = jnp.round(fine_ND)  # [-127, 127], as is what it leaves over, times 254
        columns = jnp.concatenate([whole_ND, jnp.round((fine_ND - whole_ND) * 254)])
        y_FN = _sum_over_last(w_FD, columns.astype(jnp.int8), jnp.int32).astype(jnp.float32)
        return (y_FN[:, :N] + y_FN[:, N:] / 254).T * peak_N1 * scale_F
    if scale_F is not None:
        w_FD = w_FD.astype(jnp.bfloat16)  # exact
    x_ND, out = x_ND.astype(w_FD.dtype), jnp.promote_types(w_FD.dtype, jnp.float32)
    if N > FEW:
        y_NF = _sum_over_last(x_ND, w_FD, out)
        return y_NF if scale_F is None else y_NF * scale_F
    if w_FD.dtype == jnp.bfloat16:
        x_ND = jnp.pad(x_ND, ((0, max(0, 2 - N)), (0, 0)))
    return _sum_over_last(w_FD, x_ND, out)[:, :N].T


def _sum_over_last(a_ND: jax.Array, b_MD: jax.Array, out: DTypeLike) -> jax.Array:
    """a b^T, [N, M], summed in `out`."""
    precision = jax.lax.Precision.HIGHEST if a_ND.dtype in (jnp.float32, jnp.float64) else None
    return jax.lax.dot_general(
        a_ND, b_MD, (((1,), (1,)), ((), ())), preferred_element_type=out, precision=precision
    )


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x over its root mean square, times scale."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale_D.astype(x.dtype)


def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, eps: float) -> jax.Array:
    """Layer normalisation; no bias where bias_D is None."""
    x = x - jnp.mean(x, -1, keepdims=True)
    y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale_D.astype(x.dtype)
    return y if bias_D is None else y + bias_D.astype(y.dtype)


def activate(kind: str, x: jax.Array) -> jax.Array:
    """config.activation by name: "gelu" is by erf."""
    if kind == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=kind == "gelu_tanh")
