"""MPT: LayerNorm without bias, ALiBi, one block after the other."""

from typing import Any

import jax

from sinks.config import ModelConfig
from sinks.models import parts
from sinks.models.parts import embed, unembed

__all__ = ["block", "embed", "layout", "unembed"]


def layout(c: ModelConfig) -> dict[str, Any]:
    """Names, shapes and axes of the parameters; see sinks/params.py."""
    blocks = {
        **parts.norm_leaves(c, "attn_norm"),
        **parts.attention_leaves(c),
        **parts.norm_leaves(c, "mlp_norm"),
        **parts.mlp_leaves(c),
    }
    return parts.model_leaves(c, blocks)


def block(c: ModelConfig, p: dict[str, Any], x_BTD: jax.Array, attend) -> jax.Array:
    """x + attention(norm(x)), then x + mlp(norm(x))."""
    x_BTD = x_BTD + parts.attention(c, p, parts.norm(c, p, "attn_norm", x_BTD), attend)
    return x_BTD + parts.mlp(c, p, parts.norm(c, p, "mlp_norm", x_BTD))
