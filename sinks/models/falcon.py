"""Falcon: 7B (one key head, one norm for both branches), 40B and 180B (key heads in groups, a norm for each), 11B (groups,
one norm), and RW (ALiBi, one branch after the other)."""

from typing import Any

import jax

from sinks.config import ModelConfig
from sinks.models import neox_like
from sinks.models.neox_like import embed, unembed

__all__ = ["block", "embed", "layout", "unembed"]


def layout(c: ModelConfig) -> dict[str, Any]:
    """Names, shapes and axes of the parameters; see sinks/params.py."""
    shared = c.parallel_residual and c.parallel_norms == 1
    blocks = {
        **neox_like.norm_leaves(c, "attn_norm"),
        **neox_like.attention_leaves(c),
        **({} if shared else neox_like.norm_leaves(c, "mlp_norm")),
        **neox_like.mlp_leaves(c),
    }
    return neox_like.model_leaves(c, blocks)


def block(c: ModelConfig, p: dict[str, Any], x_BTD: jax.Array, attend) -> jax.Array:
    """x + attention(h) + mlp(h') with h, h' norms of x, one and the same in 7B; RW's MLP reads attention's result."""
    h_BTD = neox_like.norm(c, p, "attn_norm", x_BTD)
    attended_BTD = x_BTD + neox_like.attention(c, p, h_BTD, attend)
    if not c.parallel_residual:
        h_BTD = neox_like.norm(c, p, "mlp_norm", attended_BTD)
    elif c.parallel_norms == 2:
        h_BTD = neox_like.norm(c, p, "mlp_norm", x_BTD)
    return attended_BTD + neox_like.mlp(c, p, h_BTD)
