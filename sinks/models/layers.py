"""What the families share: products, norms, activations. Legend: ... any leading axes, D inputs, F outputs."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from common.nn.policy import Policy
from common.sharding import Axes


@dataclass(frozen=True)
class Leaf:
    """One array of a layout: its shape (one block's), its logical axes, and how it starts.

    Attributes:
      init: "normal", "ones", "zeros", or "out" (a product into the residual stream: normal, scaled down by depth).
    """

    shape: tuple[int, ...]
    axes: Axes
    init: str = "normal"


def dense(x: jax.Array, w_DF: jax.Array, bias_F: jax.Array | None = None) -> jax.Array:
    """x [..., D] times w, [..., F] in float32. Operands take the weights' type: bfloat16 weights make bfloat16 products."""
    if w_DF.dtype == jnp.float64:
        y = jnp.einsum("...d,df->...f", x.astype(w_DF.dtype), w_DF)
    else:
        y = Policy(compute=w_DF.dtype.name).dense(x, w_DF)
    return y if bias_F is None else y + bias_F.astype(y.dtype)


def logits(params: dict, x: jax.Array, *, tied: bool) -> jax.Array:
    """Products with "unembed" [D, V], or with "embed" [V, D] where `tied`: [..., V] in float32."""
    if not tied:
        return dense(x, params["unembed"])
    w_VD = params["embed"]  # contracted as it lies: turning it round would copy it for every token
    out = jnp.promote_types(w_VD.dtype, jnp.float32)
    precision = None if w_VD.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(
        "...d,vd->...v", x.astype(w_VD.dtype), w_VD, preferred_element_type=out, precision=precision
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
