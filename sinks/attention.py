"""Attention over sinks, ring and new tokens: one softmax, for one token or a chunk of any length.

A chunk gives exactly what its tokens give one by one (docs/papers/streamingllm.md 2: each query has its own visible set and
distances, and what a layer stores for a token depends on that token's query alone). So a long text needs no loop over
tokens.

Legend: B batch, T new tokens, H query heads, G key heads, Q = H / G query heads per key head, K head width, S sinks,
R ring slots, M keys.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.sharding import BATCH_AXES, batch_ways, partition_spec
from sinks import kernel
from sinks.cache import RULES, CacheSpec, Layer, decode_kv, encode_kv, write_sinks
from sinks.config import ModelConfig
from sinks.ops import fused_or_plain
from sinks.positions import (
    NOWHERE,
    Rotation,
    alibi_slopes,
    between,
    distance,
    evicted_at,
    ring_index,
    rotate,
    rotation,
    visible,
)

# Queries of a chunk that share one slice of keys: R + 256, of which each query sees R + 1.
QUERY_BLOCK = 256


class Plan(NamedTuple):
    """The chunk's place in the stream: computed once per forward pass, the same for every layer.

    Attributes:
      start: tokens seen before, [B]; n: new tokens, the first n of T, [B].
      t: token index of each query, evicted: tokens forgotten by then, both [B, T].
      recent: rotation at t, for new keys and for queries to recent ones; sink: at t - evicted, for queries to sinks.
    """

    start: jax.Array
    n: jax.Array
    t: jax.Array
    evicted: jax.Array
    recent: Rotation
    sink: Rotation


class Keys(NamedTuple):
    """Keys with their values, k, v: [B, G, M, K], and their token indices, j: [B, M], NOWHERE for none."""

    k: jax.Array
    v: jax.Array
    j: jax.Array


class Bias(NamedTuple):
    """What a model adds to its scores: ALiBi's slopes [H] or None; a logit that belongs to no key [H] or None."""

    slopes: jax.Array | None
    no_key: jax.Array | None


def make_plan(
    config: ModelConfig,
    spec: CacheSpec,
    start_B: jax.Array,
    evicted_B: jax.Array,
    n_B: jax.Array,
    T: int,
    dtype: jnp.dtype,
) -> Plan:
    """Positions and rotations of T tokens after the first start_B."""
    t_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)
    evicted_BT = evicted_at(t_BT, spec.capacity, evicted_B[:, None])
    recent = rotation(config, t_BT, dtype)
    sink = rotation(config, t_BT - evicted_BT, dtype)
    return Plan(start_B, n_B, t_BT, evicted_BT, recent, sink)


def attend(
    config: ModelConfig,
    spec: CacheSpec,
    plan: Plan,
    layer: Layer | None,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    sink_logit_H: jax.Array | None,
) -> tuple[jax.Array, Layer]:
    """Attention of T new tokens, each over its own visible set.

    Args:
      layer: the cache of this layer; None: the stream begins here (training).

    Returns:
      The mixed values [B, T, H, K], and what the cache has to keep: {"sink_k", "sink_v"} as they now stand, and the new
      tokens' {"k", "v"} (with int8, their scales too), [B, G, T, ...].
    """
    stored = jnp.dtype(spec.dtype)
    k_BGTK = rotate(k_BTGK, plan.recent).swapaxes(1, 2).astype(stored)
    v_BGTK = v_BTGK.swapaxes(1, 2).astype(stored)
    if layer is None:
        sink_k, sink_v = k_BGTK[:, :, : spec.sinks], v_BGTK[:, :, : spec.sinks]
    else:
        sink_k = write_sinks(layer["sink_k"], k_BGTK, plan.start, plan.n)
        sink_v = write_sinks(layer["sink_v"], v_BGTK, plan.start, plan.n)
    kept = {"sink_k": sink_k, "sink_v": sink_v, **encode_kv(spec, k_BGTK, v_BGTK)}

    sink = Keys(sink_k, sink_v, jnp.arange(sink_k.shape[2])[None])
    # New tokens are read as the ring will hold them, so that in int8 too it does not matter where a text is cut. The
    # sinks among them are read from their own slots.
    new = Keys(*decode_kv(spec, kept), jnp.where(plan.t >= spec.sinks, plan.t, NOWHERE))
    q_sink = _by_key_head(rotate(q_BTHK, plan.sink), new)
    q_recent = _by_key_head(rotate(q_BTHK, plan.recent), new)
    given = (q_sink, q_recent, sink, new, _bias(config, sink_logit_H))
    if layer is not None and q_BTHK.shape[1] == 1:
        mixed_BGQTK = _decode(spec, plan, layer, *given)
    else:
        mixed_BGQTK = _chunk(spec, plan, layer, *given)
    return mixed_BGQTK.transpose(0, 3, 1, 2, 4).reshape(q_BTHK.shape), kept


def _decode(
    spec: CacheSpec,
    plan: Plan,
    layer: Layer,
    q_sink: jax.Array,
    q_recent: jax.Array,
    sink: Keys,
    new: Keys,
    bias: Bias,
) -> jax.Array:
    """One token over sinks, ring and itself; the ring is read as it lies. Returns [B, G, Q, 1, K]."""
    ring = _ring(spec, layer, plan.start)

    def plain() -> jax.Array:
        parts = [(q_sink, sink)] if spec.sinks else []
        parts += [(q_recent, ring), (q_recent, new)]
        return _softmax_mix(parts, plan.t, plan.evicted, spec.sinks, bias)

    def fused() -> jax.Array:
        # The kernel takes two sets of keys. The new token joins the sinks, whose copy is small: it is turned back from
        # its own rotation to theirs.
        back = between(plan.recent, plan.sink)
        k_here = rotate(new.k.swapaxes(1, 2), back).swapaxes(1, 2).astype(sink.k.dtype)
        j = jnp.broadcast_to(sink.j, (len(new.j), sink.j.shape[1]))
        first = _joined(Keys(sink.k, sink.v, j), Keys(k_here, new.v, new.j))
        stored = Keys(layer["k"], layer["v"], ring.j)
        scales = (layer["k_scale"], layer["v_scale"]) if spec.int8 else None
        return _kernel(q_sink, q_recent, first, stored, plan, spec.sinks, bias, scales)

    return fused_or_plain(fused, plain) if _kernel_fits(spec, new.k) else plain()


def _chunk(
    spec: CacheSpec,
    plan: Plan,
    layer: Layer | None,
    q_sink: jax.Array,
    q_recent: jax.Array,
    sink: Keys,
    new: Keys,
    bias: Bias,
) -> jax.Array:
    """T tokens over sinks, ring (if there is a cache) and each other, by blocks of queries. Returns [B, G, Q, T, K]."""
    recent = new if layer is None else _joined(_ring(spec, layer, plan.start, in_order=True), new)
    T, M = q_recent.shape[3], recent.k.shape[2]

    def block(first: int, last: int) -> jax.Array:
        """Queries first .. last-1 of the chunk, over the slice of keys that any of them may see."""
        rows, seen = slice(first, last), slice(max(0, M - T + first - spec.recent), M - T + last)
        keys = Keys(recent.k[:, :, seen], recent.v[:, :, seen], recent.j[:, seen])
        parts = [(q_sink[:, :, :, rows], sink)] if spec.sinks else []
        parts.append((q_recent[:, :, :, rows], keys))
        return _softmax_mix(parts, plan.t[:, rows], plan.evicted[:, rows], spec.sinks, bias)

    def plain() -> jax.Array:
        mixed = [block(i, min(i + QUERY_BLOCK, T)) for i in range(0, T, QUERY_BLOCK)]
        return jnp.concatenate(mixed, 3) if len(mixed) > 1 else mixed[0]

    def fused() -> jax.Array:
        return _kernel(q_sink, q_recent, sink, recent, plan, spec.sinks, bias)

    fits = layer is not None and _kernel_fits(spec, new.k)
    return fused_or_plain(fused, plain) if fits else plain()


def _joined(a: Keys, b: Keys) -> Keys:
    return Keys(*(jnp.concatenate(pair, axis) for *pair, axis in zip(a, b, (2, 2, 1))))


def _kernel_fits(spec: CacheSpec, k_BGTK: jax.Array) -> bool:
    """Whether sinks/kernel.py computes this: not in float64, nor on a mesh that does not divide rows and heads."""
    (B, G), mesh = k_BGTK.shape[:2], jax.sharding.get_abstract_mesh()
    if spec.dtype == "float64":
        return False
    if mesh.empty:
        return True
    ours = {*BATCH_AXES, RULES["heads"]} <= set(mesh.axis_names)
    return ours and B % batch_ways(mesh) == 0 and G % mesh.shape[RULES["heads"]] == 0


def _kernel(
    q_sink: jax.Array,
    q_recent: jax.Array,
    sink: Keys,
    recent: Keys,
    plan: Plan,
    S: int,
    bias: Bias,
    scales: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """kernel.mix; on a mesh each device does its own rows and key heads."""
    B, G, Q, T, _ = q_recent.shape
    slopes = jnp.zeros(G * Q) if bias.slopes is None else bias.slopes
    no_key = jnp.full(G * Q, -jnp.inf) if bias.no_key is None else bias.no_key
    sink = sink._replace(j=jnp.broadcast_to(sink.j, (B, sink.j.shape[1])))
    per_head = tuple(x.astype(jnp.float32).reshape(G, Q) for x in (slopes, no_key))
    args = (q_sink, q_recent, *sink, *recent, plan.t, plan.evicted, *per_head, scales)
    run = partial(kernel.mix, n_sinks=S)
    if jax.sharding.get_abstract_mesh().empty:
        return run(*args)
    keys, rows, heads = (
        partition_spec(a, RULES) for a in (("batch", "heads"), ("batch",), ("heads",))
    )
    specs = (keys, keys, *(keys, keys, rows) * 2, rows, rows, heads, heads, keys)
    return jax.shard_map(run, in_specs=specs, out_specs=keys, check_vma=False)(*args)


def _softmax_mix(
    parts: list[tuple[jax.Array, Keys]],
    t_BT: jax.Array,
    evicted_BT: jax.Array,
    n_sinks: int,
    bias: Bias,
) -> jax.Array:
    """One softmax over all parts, each a pair of queries [B, G, Q, T, K] and keys: the mixed values [B, G, Q, T, K]."""
    scores = []
    for q_BGQTK, keys in parts:
        t, j, evicted = t_BT[:, :, None], keys.j[:, None, :], evicted_BT[:, :, None]
        G, Q, K = (q_BGQTK.shape[i] for i in (1, 2, 4))
        score = _scores(q_BGQTK, keys.k) * K**-0.5
        if bias.slopes is not None:
            far_BTM = distance(t, j, evicted, n_sinks).astype(score.dtype)
            score -= bias.slopes.reshape(G, Q, 1, 1).astype(score.dtype) * far_BTM[:, None, None]
        seen_BTM = visible(t, j, evicted, n_sinks)
        scores.append(jnp.where(seen_BTM[:, None, None], score, -jnp.inf))

    peak = jnp.stack([score.max(-1) for score in scores]).max(0)
    # Padding in an empty row sees nothing at all.
    peak = jnp.maximum(peak, jnp.finfo(peak.dtype).min)
    if bias.no_key is not None:
        no_key = bias.no_key.reshape(1, *scores[0].shape[1:3], 1).astype(peak.dtype)
        peak = jnp.maximum(peak, no_key)
    peak = jax.lax.stop_gradient(peak)
    total = 0.0 if bias.no_key is None else jnp.exp(no_key - peak)
    mixed = 0.0
    for score, (_, keys) in zip(scores, parts):
        weight = jnp.exp(score - peak[..., None])
        total += weight.sum(-1)
        mixed += _einsum("BGQTM,BGMK->BGQTK", weight.astype(keys.v.dtype), keys.v)
    return mixed / jnp.where(total == 0, 1, total)[..., None]


def _ring(spec: CacheSpec, layer: Layer, start_B: jax.Array, *, in_order: bool = False) -> Keys:
    """The ring's keys after start_B tokens: as they lie, or from the oldest to the newest (a copy)."""
    j_BR = ring_index(start_B, spec.sinks, spec.recent)
    if in_order:
        slot_BR = (start_B[:, None] - spec.sinks + jnp.arange(spec.recent)) % spec.recent
        pick = jax.vmap(lambda x, slots: jnp.take(x, slots, axis=1))
        layer = {name: pick(x, slot_BR) for name, x in layer.items() if not name.startswith("sink")}
        j_BR = jnp.take_along_axis(j_BR, slot_BR, 1)
    return Keys(*decode_kv(spec, layer), j_BR)


def _by_key_head(q_BTHK: jax.Array, keys: Keys) -> jax.Array:
    """Queries [B, G, Q, T, K], in the keys' type."""
    B, T, H, K = q_BTHK.shape
    G = keys.k.shape[1]
    return q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).astype(keys.k.dtype)


def _bias(config: ModelConfig, sink_logit_H: jax.Array | None) -> Bias:
    slopes = alibi_slopes(config)
    if config.sink_logits == "zero":
        sink_logit_H = jnp.zeros(config.heads)
    return Bias(None if slopes is None else jnp.asarray(slopes), sink_logit_H)


def _scores(q_BGQTK: jax.Array, k_BGMK: jax.Array) -> jax.Array:
    """Products of all queries with all keys, [B, G, Q, T, M]."""
    if q_BGQTK.shape[3] > 1:
        return _einsum("BGQTK,BGMK->BGQTM", q_BGQTK, k_BGMK)
    # One query: with the keys as the left operand they are read as they lie; a CPU would turn them round first.
    out, precision = _accumulate(q_BGQTK)
    score_BGMQ = jax.lax.dot_general(
        k_BGMK, q_BGQTK[:, :, :, 0], (((3,), (3,)), ((0, 1), (0, 1))),
        preferred_element_type=out, precision=precision,
    )  # fmt: skip
    return score_BGMQ.swapaxes(2, 3)[:, :, :, None]


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    out, precision = _accumulate(a)
    return jnp.einsum(spec, a, b, preferred_element_type=out, precision=precision)


def _accumulate(a: jax.Array) -> tuple[jnp.dtype, jax.lax.Precision | None]:
    """Operands stay as they are, sums are in float32 at least."""
    precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.promote_types(a.dtype, jnp.float32), precision
