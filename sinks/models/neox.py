"""GPT-NeoX: Pythia and GPT-NeoX-20B. LayerNorm, RoPE on a part of each head, attention and MLP side by side."""

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
    """x + attention(norm(x)) + mlp(norm'(x)); the MLP reads attention's result where the residual is not parallel."""
    attended_BTD = x_BTD + neox_like.attention(
        c, p, neox_like.norm(c, p, "attn_norm", x_BTD), attend
    )
    read_BTD = x_BTD if c.parallel_residual else attended_BTD
    return attended_BTD + neox_like.mlp(c, p, neox_like.norm(c, p, "mlp_norm", read_BTD))
