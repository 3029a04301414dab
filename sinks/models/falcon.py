"""Falcon: 7B (one key head, one norm for both branches), 40B and 180B (key heads in groups, a norm for each), 11B (groups,
one norm), and RW (ALiBi, one branch after the other)."""

from typing import Any

import jax

from sinks.config import ModelConfig
from sinks.models import parts
from sinks.models.parts import embed, unembed

__all__ = ["block", "embed", "layout", "unembed"]


def layout(c: ModelConfig) -> dict[str, Any]:
    """Names, shapes and axes of the parameters; see sinks/params.py."""
    shared = c.parallel_residual and c.parallel_norms == 1
    blocks = {
        **parts.norm_leaves(c, "attn_norm"),
        **parts.attention_leaves(c),
        **({} if shared else parts.norm_leaves(c, "mlp_norm")),
        **parts.mlp_leaves(c),
    }
    return parts.model_leaves(c, blocks)


def block(c: ModelConfig, p: dict[str, Any], x_BTD: jax.Array, attend) -> jax.Array:
    """x + attention(h) + mlp(h') with h, h' norms of x, one and the same in 7B; RW's MLP reads attention's result."""
    h_BTD = parts.norm(c, p, "attn_norm", x_BTD)
    attended_BTD = x_BTD + parts.attention(c, p, h_BTD, attend)
    if not c.parallel_residual:
        h_BTD = parts.norm(c, p, "mlp_norm", attended_BTD)
    elif c.parallel_norms == 2:
        h_BTD = parts.norm(c, p, "mlp_norm", x_BTD)
    return attended_BTD + parts.mlp(c, p, h_BTD)
