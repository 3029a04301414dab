"""Where attention goes: the weights of every head on every token, and the share that the first tokens take (paper, Fig. 2).

Weights are computed densely, layer by layer, from the same visible sets and distances as the stream's.

Legend: B batch, T tokens, L layers, H query heads, G key heads, Q = H / G, K head width.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sinks import models
from sinks.cache import CacheSpec
from sinks.config import ModelConfig
from sinks.params import Params
from sinks.positions import alibi_slopes, distance, evicted_at, rotate, rotation, visible


class Maps(NamedTuple):
    """Mean attention over a batch of texts.

    Attributes:
      weight_LHTT: how much of its attention query t (third axis) gives token j (last axis). Rows add up to 1, less what
        goes to no token where the model has a sink logit.
      no_key_LHT: that rest, zeros in models without.
    """

    weight_LHTT: jax.Array | np.ndarray
    no_key_LHT: jax.Array | np.ndarray


@partial(jax.jit, static_argnums=(0, 2))
def attention_maps(
    config: ModelConfig, params: Params, spec: CacheSpec, tokens_BT: jax.Array
) -> Maps:
    """Attention of texts that begin a stream.

    Args:
      params: with stacked blocks.
      spec: what queries may see; recent >= T is ordinary causal attention.

    Needs L H T^2 floats: meant for some hundreds of tokens.
    """
    weight_LHTT = _run(config, params, spec, tokens_BT)[1]
    return Maps(weight_LHTT, 1 - weight_LHTT.sum(-1))


def _run(
    config: ModelConfig, params: Params, spec: CacheSpec, tokens_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The last block's output, as `stream.hidden_from_start` has it, and all mean weights [L, H, T, T]."""
    family = models.family(config)
    T = tokens_BT.shape[1]
    t = jnp.arange(T, dtype=jnp.int32)
    evicted = evicted_at(t, spec.capacity)
    query, key = t[:, None], t[None, :]
    seen_TT = visible(query, key, evicted[:, None], spec.sinks)
    far_TT = distance(query, key, evicted[:, None], spec.sinks)
    recent, sink = (rotation(config, at[None], jnp.float32) for at in (t, t - evicted))
    slopes = alibi_slopes(config)

    def weights(q_BTHK, k_BTGK, sink_logit_H):
        H, G = config.heads, config.kv_heads
        k_BTGK = rotate(k_BTGK, recent)

        def scores(by):
            q_BTGQK = rotate(q_BTHK, by).reshape(*q_BTHK.shape[:2], G, H // G, -1)
            dots = jnp.einsum("BTGQK,BMGK->BGQTM", q_BTGQK, k_BTGK) * config.head_dim**-0.5
            return dots.reshape(-1, H, T, T)

        score_BHTT = jnp.where((key < spec.sinks)[None, None], scores(sink), scores(recent))
        if slopes is not None:
            slope_H11 = jnp.asarray(slopes, jnp.float32)[:, None, None]
            score_BHTT -= (slope_H11 * far_TT[None].astype(jnp.float32))[None]
        score_BHTT = jnp.where(seen_TT[None, None], score_BHTT, -jnp.inf)
        if config.sink_logits == "none":
            return jax.nn.softmax(score_BHTT)
        no_key_H = jnp.zeros(H) if config.sink_logits == "zero" else sink_logit_H
        no_key = jnp.broadcast_to(no_key_H[None, :, None, None], (*score_BHTT.shape[:3], 1))
        return jax.nn.softmax(jnp.concatenate([score_BHTT, no_key], -1))[..., :T]

    def one_block(x_BTD, p):
        means = []

        def attend(q_BTHK, k_BTGK, v_BTGK, sink_logit_H):
            weight_BHTT = weights(q_BTHK, k_BTGK, sink_logit_H)
            means.append(weight_BHTT.mean(0))
            grouped = weight_BHTT.reshape(-1, config.kv_heads, config.groups, T, T)
            mixed = jnp.einsum("BGQTM,BMGK->BTGQK", grouped, v_BTGK)
            return mixed.reshape(q_BTHK.shape)

        x_BTD = family.block(config, p, x_BTD, attend)
        return x_BTD, means[0]

    x_BTD = family.embed(config, params, tokens_BT)
    return jax.lax.scan(one_block, x_BTD, params["blocks"])


def sink_share(maps: Maps, sinks: int, first: int) -> jax.Array | np.ndarray:
    """How much of their attention queries from `first` on give the first `sinks` tokens, and no token: [L, H].

    Queries before `first` see little but the sinks. Raises ValueError where no query is left.
    """
    T = maps.weight_LHTT.shape[-1]
    if not sinks <= first < T:
        raise ValueError(f"first={first}: must be at least sinks={sinks} and below the {T} tokens")
    share_LHT = maps.weight_LHTT[..., :sinks].sum(-1) + maps.no_key_LHT
    return share_LHT[:, :, first:].mean(-1)
