"""What the families share: products, norms, activations. Legend: ... any leading axes, D inputs, F outputs."""

from dataclasses import dataclass, field
from itertools import accumulate

import jax
import jax.numpy as jnp

from common.sharding import Axes
from sinks.int8 import quantize
from sinks.ops import times, times_rows


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
    x_ND = x.reshape(-1, x.shape[-1])
    y_NF = times_rows(x_ND, w.w_FD, w.scale_F) if isinstance(w, Rows) else times(x_ND, w)
    y = y_NF.reshape(*x.shape[:-1], -1)
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
