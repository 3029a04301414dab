"""The attention of sinks/attention.py as one Pallas kernel for TPUs: decode and chunk, with an online softmax.

Scores never leave the chip: keys pass through in blocks, and blocks that no query sees are skipped. What is seen, and from
how far, is `positions.visible` and `positions.distance` here too.

Legend: B batch, G key heads, Q query heads per key head, T queries, N = Q T rows, K head width, M keys.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sinks.positions import NOWHERE, distance, visible

ROWS, KEYS = 256, 512  # of a block; multiples of the chip's tile (8 x 128)
LANES = 128
MASKED = -1e30  # finite: the difference of two of them is no NaN


@partial(jax.jit, static_argnames=("n_sinks", "interpret"))
def mix(
    q_sink: jax.Array,
    q_recent: jax.Array,
    sink_k: jax.Array,
    sink_v: jax.Array,
    sink_j: jax.Array,
    recent_k: jax.Array,
    recent_v: jax.Array,
    recent_j: jax.Array,
    t: jax.Array,
    evicted: jax.Array,
    slopes: jax.Array,
    no_key: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None = None,
    *,
    n_sinks: int,
    interpret: bool = False,
) -> jax.Array:
    """One softmax over sinks and recent keys: the mixed values, float32 [B, G, Q, T, K].

    Args:
      q_sink, q_recent: [B, G, Q, T, K], rotated for either.
      sink_k, sink_v: [B, G, S, K], read by q_sink; recent_k, recent_v: [B, G, M, K], read by q_recent; sink_j, recent_j:
        their token indices [B, S], [B, M].
      t, evicted: [B, T].
      n_sinks: how many first tokens are sinks; distances depend on it, not on the number of sink_k.
      slopes, no_key: ALiBi's slope and the logit of no key, per head [G, Q]; 0 and -inf for none.
      scales: of recent_k and recent_v where they are int8: float32 [B, G, M] each.
      interpret: run without a TPU, slowly.
    """
    B, G, Q, T, K = q_recent.shape
    rows, keys = min(ROWS, _up(Q * T, 8)), min(KEYS, _up(recent_k.shape[2], LANES))
    N, M, S = _up(Q * T, rows), _up(recent_k.shape[2], keys), _up(max(sink_k.shape[2], 1), LANES)
    by_row = partial(_pad, axis=-2, size=N)  # [..., Q T, ...] with rows of padding
    q = [by_row(x.reshape(B, G, Q * T, K)) for x in (q_sink, q_recent)]
    times = [by_row(jnp.tile(x, (1, Q))[..., None]) for x in (t, evicted)]
    per_head = [
        by_row(jnp.repeat(x.astype(jnp.float32), T, axis=1)[..., None], value=value)
        for x, value in ((slopes, 0), (jnp.maximum(no_key, MASKED), MASKED))
    ]
    sink_kv = [_pad(x, 2, S) for x in (sink_k, sink_v)]
    sink_j = _pad(sink_j, 1, S, NOWHERE)[:, None]
    # Not padded, which would copy the ring: what the last block reads beyond its end is masked.
    recent_j = _pad(recent_j, 1, M, NOWHERE)[:, None]
    by_slot = [x[:, :, None] for x in scales or ()]

    in_specs, row = _blocks(rows, keys, S, K, len(by_slot))
    order = ("parallel", "parallel", "parallel", "arbitrary")
    out = pl.pallas_call(
        partial(_kernel, n_sinks, recent_k.shape[2], K**-0.5),
        grid=(B, G, N // rows, M // keys),
        in_specs=in_specs,
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct((B, G, N, K), jnp.float32),
        scratch_shapes=[pltpu.VMEM((rows, w), jnp.float32) for w in (LANES, LANES, K)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=order),
        interpret=interpret,
    )(*q, *times, *per_head, *sink_kv, sink_j, recent_k, recent_v, recent_j, *by_slot)
    return out[:, :, : Q * T].reshape(B, G, Q, T, K)


def _blocks(rows: int, keys: int, S: int, K: int, scales: int) -> tuple[list, pl.BlockSpec]:
    """The block of each of `_kernel`'s arrays at a place (b, g, i, m) of the grid, and that of its result."""
    row = pl.BlockSpec((None, None, rows, K), lambda b, g, i, m: (b, g, i, 0))
    time = pl.BlockSpec((None, rows, 1), lambda b, g, i, m: (b, i, 0))
    head = pl.BlockSpec((None, rows, 1), lambda b, g, i, m: (g, i, 0))
    sink = pl.BlockSpec((None, None, S, K), lambda b, g, i, m: (b, g, 0, 0))
    sink_j = pl.BlockSpec((None, 1, S), lambda b, g, i, m: (b, 0, 0))
    key = pl.BlockSpec((None, None, keys, K), lambda b, g, i, m: (b, g, m, 0))
    key_j = pl.BlockSpec((None, 1, keys), lambda b, g, i, m: (b, 0, m))
    scale = pl.BlockSpec((None, None, 1, keys), lambda b, g, i, m: (b, g, 0, m))
    specs = [row, row, time, time, head, head, sink, sink, sink_j, key, key, key_j]
    return [*specs, *[scale] * scales], row


def _kernel(
    n_sinks, ends, scale,
    q_sink, q_recent, t, evicted, slope, no_key, sink_k, sink_v, sink_j, recent_k, recent_v, recent_j, *rest,
):  # fmt: skip
    """One block of rows against one block of keys; before the first, against the sinks."""
    *scales, out, peak, total, mixed = rest

    def accumulate(q, k, v, j, is_there, k_scale=1, v_scale=1):
        seen = visible(t[...], j, evicted[...], n_sinks)

        @pl.when(jnp.max(seen.astype(jnp.int32)) > 0)
        def _():
            score = _dot(q[...], k[...].astype(q.dtype), (1, 1)) * (scale * k_scale)
            score -= slope[...] * distance(t[...], j, evicted[...], n_sinks).astype(jnp.float32)
            score = jnp.where(seen, score, MASKED)
            old = peak[:, :1]
            new = jnp.maximum(old, score.max(-1, keepdims=True))
            weight = jnp.where(seen, jnp.exp(score - new), 0)
            shrink = jnp.exp(old - new)
            now = shrink * total[:, :1] + weight.sum(-1, keepdims=True)
            weight = jnp.where(seen, weight * v_scale, 0)
            value = jnp.where(is_there, v[...].astype(q.dtype), 0)
            mixed[...] = shrink * mixed[...] + _dot(weight.astype(q.dtype), value, (1, 0))
            peak[...] = jnp.broadcast_to(new, peak.shape)
            total[...] = jnp.broadcast_to(now, total.shape)

    @pl.when(pl.program_id(3) == 0)
    def _():
        peak[...] = jnp.broadcast_to(no_key[...], peak.shape)
        counts = (no_key[...] > MASKED).astype(jnp.float32)
        total[...] = jnp.broadcast_to(counts, total.shape)
        mixed[...] = jnp.zeros_like(mixed)
        accumulate(q_sink, sink_k, sink_v, sink_j[...], True)

    keys = recent_k.shape[0]
    place = jax.lax.broadcasted_iota(jnp.int32, (keys, 1), 0) + pl.program_id(3) * keys
    scales = (x[...] for x in scales)
    accumulate(q_recent, recent_k, recent_v, recent_j[...], place < ends, *scales)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        all_of_it = total[:, :1]
        out[...] = mixed[...] / jnp.where(all_of_it == 0, 1, all_of_it)


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32, precision=precision)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _pad(x: jax.Array, axis: int, size: int, value: float = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)
