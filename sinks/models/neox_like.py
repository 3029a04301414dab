"""What GPT-NeoX, MPT and Falcon have in common: LayerNorm, attention, and an MLP of two products.

Parameters of a layer are `name` and, where it has one, `name_bias`.

Legend: B batch, T tokens, D width, H heads, G key heads,
K head width, F hidden width, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sinks.config import ModelConfig
from sinks.models.layers import Leaf, activate, dense, layer_norm, logits, project

Leaves = dict[str, Any]


def norm_leaves(c: ModelConfig, name: str) -> Leaves:
    """A LayerNorm called `name`."""
    leaves = {name: Leaf((c.width,), (None,), "ones")}
    if c.norm_bias:
        leaves[f"{name}_bias"] = Leaf((c.width,), (None,), "zeros")
    return leaves


def attention_leaves(c: ModelConfig) -> Leaves:
    """q, k, v, o, and the sink's logit where it is learned."""
    D, query, key = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim
    leaves = {
        "q": Leaf((D, query), ("embed", "heads")),
        "k": Leaf((D, key), ("embed", "heads")),
        "v": Leaf((D, key), ("embed", "heads")),
        "o": Leaf((query, D), ("heads", "embed"), "out"),
    }
    if c.attention_bias:
        leaves["q_bias"] = Leaf((query,), ("heads",), "zeros")
        leaves["k_bias"] = Leaf((key,), ("heads",), "zeros")
        leaves["v_bias"] = Leaf((key,), ("heads",), "zeros")
    if c.attention_bias if c.out_bias is None else c.out_bias:
        leaves["o_bias"] = Leaf((D,), (None,), "zeros")
    if c.sink_logits == "learned":
        leaves["sink_logit"] = Leaf((c.heads,), ("heads",), "zeros")
    return leaves


def mlp_leaves(c: ModelConfig) -> Leaves:
    """up and down."""
    leaves = {
        "up": Leaf((c.width, c.mlp_dim), ("embed", "mlp")),
        "down": Leaf((c.mlp_dim, c.width), ("mlp", "embed"), "out"),
    }
    if c.mlp_bias:
        leaves["up_bias"] = Leaf((c.mlp_dim,), ("mlp",), "zeros")
        leaves["down_bias"] = Leaf((c.width,), (None,), "zeros")
    return leaves


def model_leaves(c: ModelConfig, blocks: Leaves) -> Leaves:
    """The whole tree around one block's leaves."""
    tree = {
        "embed": Leaf((c.vocab_size, c.width), ("vocab", "embed")),
        "blocks": blocks,
        **norm_leaves(c, "norm"),
    }
    if not c.tie_embeddings:
        tree["unembed"] = Leaf((c.width, c.vocab_size), ("embed", "vocab"))
    return tree


def embed(c: ModelConfig, params: Leaves, tokens_BT: jax.Array) -> jax.Array:
    """Token embeddings [B, T, D], in float32 (float64 for float64 parameters)."""
    x = params["embed"][tokens_BT]
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def norm(c: ModelConfig, p: Leaves, name: str, x: jax.Array) -> jax.Array:
    """The LayerNorm called `name`."""
    return layer_norm(x, p[name], p.get(f"{name}_bias"), c.norm_eps)


def attention(c: ModelConfig, p: Leaves, h_BTD: jax.Array, attend) -> jax.Array:
    """o attend(q h, k h, v h), with MPT's bound on the three where the config has one."""
    B, T, _ = h_BTD.shape

    qkv = project(h_BTD, p, "q", "k", "v")
    if c.clip_qkv:
        qkv = [jnp.clip(y, -c.clip_qkv, c.clip_qkv) for y in qkv]
    q_BTHK, k_BTGK, v_BTGK = (y.reshape(B, T, -1, c.head_dim) for y in qkv)
    mixed_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, p.get("sink_logit"))
    return dense(mixed_BTHK.reshape(B, T, -1), p["o"], p.get("o_bias"))


def mlp(c: ModelConfig, p: Leaves, h: jax.Array) -> jax.Array:
    """down act(up h)."""
    hidden = activate(c.activation, dense(h, p["up"], p.get("up_bias")))
    return dense(hidden, p["down"], p.get("down_bias"))


def unembed(c: ModelConfig, params: Leaves, x_BTD: jax.Array) -> jax.Array:
    """Logits [B, T, V] in float32."""
    return logits(params, norm(c, params, "norm", x_BTD))
