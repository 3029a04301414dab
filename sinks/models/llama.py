"""Llama: SmolLM2, Llama 2 and 3, Mistral, Qwen2, and all others with RMSNorm, RoPE and a gated MLP.

Legend: B batch, T tokens, D width, H heads, G key heads, K head width, F hidden width, V vocabulary.
"""

from typing import Any

import jax

from sinks.config import ModelConfig
from sinks.models.layers import Leaf, activate, dense, embed, logits, project, rms_norm

__all__ = ["block", "embed", "layout", "unembed"]


def layout(c: ModelConfig) -> dict[str, Any]:
    """Names, shapes and axes of the parameters; see sinks/params.py."""
    D, F, V, H, G, K = c.width, c.mlp_dim, c.vocab_size, c.heads, c.kv_heads, c.head_dim
    blocks = {
        "attn_norm": Leaf((D,), (None,), "ones"),
        "q": Leaf((D, H * K), ("embed", "heads")),
        "k": Leaf((D, G * K), ("embed", "heads")),
        "v": Leaf((D, G * K), ("embed", "heads")),
        "o": Leaf((H * K, D), ("heads", "embed"), "out"),
        "mlp_norm": Leaf((D,), (None,), "ones"),
        "gate": Leaf((D, F), ("embed", "mlp")),
        "up": Leaf((D, F), ("embed", "mlp")),
        "down": Leaf((F, D), ("mlp", "embed"), "out"),
    }
    if c.attention_bias:
        blocks["q_bias"] = Leaf((H * K,), ("heads",), "zeros")
        blocks["k_bias"] = Leaf((G * K,), ("heads",), "zeros")
        blocks["v_bias"] = Leaf((G * K,), ("heads",), "zeros")
    if c.attention_bias if c.out_bias is None else c.out_bias:
        blocks["o_bias"] = Leaf((D,), (None,), "zeros")
    if c.mlp_bias:
        blocks["gate_bias"] = Leaf((F,), ("mlp",), "zeros")
        blocks["up_bias"] = Leaf((F,), ("mlp",), "zeros")
        blocks["down_bias"] = Leaf((D,), (None,), "zeros")
    if c.sink_logits == "learned":
        blocks["sink_logit"] = Leaf((H,), ("heads",), "zeros")
    tree = {
        "embed": Leaf((V, D), ("vocab", "embed")),
        "blocks": blocks,
        "norm": Leaf((D,), (None,), "ones"),
    }
    if not c.tie_embeddings:
        tree["unembed"] = Leaf((D, V), ("embed", "vocab"))
    return tree


def block(c: ModelConfig, p: dict[str, Any], x_BTD: jax.Array, attend) -> jax.Array:
    """x + attention(norm(x)), then x + mlp(norm(x)) with mlp(h) = down(act(gate h) * up h)."""
    B, T, _ = x_BTD.shape
    h = rms_norm(x_BTD, p["attn_norm"], c.norm_eps)
    q_BTHK, k_BTGK, v_BTGK = (y.reshape(B, T, -1, c.head_dim) for y in project(h, p, "q", "k", "v"))
    mixed_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, p.get("sink_logit"))
    x_BTD = x_BTD + dense(mixed_BTHK.reshape(B, T, -1), p["o"], p.get("o_bias"))

    h = rms_norm(x_BTD, p["mlp_norm"], c.norm_eps)
    gate_BTF, up_BTF = project(h, p, "gate", "up")
    hidden_BTF = activate(c.activation, gate_BTF) * up_BTF
    return x_BTD + dense(hidden_BTF, p["down"], p.get("down_bias"))


def unembed(c: ModelConfig, params: dict[str, Any], x_BTD: jax.Array) -> jax.Array:
    """Logits [B, T, V] in float32."""
    x_BTD = rms_norm(x_BTD, params["norm"], c.norm_eps)
    return logits(params, x_BTD)
