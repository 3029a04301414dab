"""Models small enough for float64 references."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sinks import params as parameters
from sinks import stream
from sinks.cache import CacheSpec, init
from sinks.config import ModelConfig


def config(**changes: Any) -> ModelConfig:
    values = dict(
        family="llama", vocab_size=17, width=8, depth=2, heads=4, kv_heads=2, head_dim=4, mlp_dim=12
    )
    values |= dict(max_positions=64, rope_theta=100.0, tie_embeddings=True)
    return ModelConfig(**(values | changes))


def params(c: ModelConfig, dtype=jnp.float32, seed: int = 0, stacked: bool = True):
    """Parameters large enough that attention is far from uniform."""
    values = parameters.init(c, jax.random.key(seed), dtype)
    spread = lambda p: p * 4 if p.ndim > 1 and p.shape[-1] > 1 else p  # noqa: E731
    values = jax.tree.map(spread, values)
    if c.sink_logits == "learned":
        values["blocks"]["sink_logit"] = jax.random.normal(
            jax.random.key(seed + 1), (c.depth, c.heads), dtype
        )
    return stream.prepare(values, stacked=stacked)


def stream_logits(c, p, spec: CacheSpec, rows, cuts, pad: int = 0):
    """Logits of every token of ragged rows, fed in chunks: chunk i takes cuts[i][b] tokens of row b.

    Chunks are padded to `pad` tokens, so that there is little to compile; those of one token are not.
    """
    cache = init(c, spec, len(rows), stacked=isinstance(p["blocks"], dict))
    at, out = [0] * len(rows), [[] for _ in rows]
    for cut in cuts:
        T = max(cut) if max(cut) == 1 else max(pad, *cut)
        tokens = [list(row[a : a + n]) + [0] * (T - n) for row, a, n in zip(rows, at, cut)]
        logits, cache = chunk_logits(c, p, cache, jnp.asarray(tokens), jnp.asarray(cut, jnp.int32))
        for b, n in enumerate(cut):
            out[b].append(logits[b, :n])
            at[b] += n
    return [jnp.concatenate(parts) for parts in out], cache


@partial(jax.jit, static_argnums=0)
def chunk_logits(c, p, cache, tokens, n):
    x, cache = stream.hidden(c, p, cache, tokens, n)
    return stream.unembed(c, p, x), cache
