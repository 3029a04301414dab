"""MPT: LayerNorm without bias, ALiBi, one block after the other."""

from typing import Any

import jax

from sinks.config import ModelConfig
from sinks.models import neox_like
from sinks.models.neox_like import embed, unembed

__all__ = ["block", "embed", "layout", "unembed"]


def layout(c: ModelConfig) -> dict[str, Any]:
    """Names, shapes and axes of the parameters; see sinks/params.py."""
    blocks = {
        **neox_like.norm_leaves(c, "attn_norm"),
        **neox_like.attention_leaves(c),
        **neox_like.norm_leaves(c, "mlp_norm"),
        **neox_like.mlp_leaves(c),
    }
    return neox_like.model_leaves(c, blocks)


def block(c: ModelConfig, p: dict[str, Any], x_BTD: jax.Array, attend) -> jax.Array:
    """x + attention(norm(x)), then x + mlp(norm(x))."""
    x_BTD = x_BTD + neox_like.attention(c, p, neox_like.norm(c, p, "attn_norm", x_BTD), attend)
    return x_BTD + neox_like.mlp(c, p, neox_like.norm(c, p, "mlp_norm", x_BTD))
