"""Running a model along a stream: one token, a chunk, or a text of any length, at constant memory.

    config, params, tokenizer = sinks.load("smollm2-135m")
    params = stream.prepare(params)
    memory = cache.init(config, CacheSpec(sinks=4, recent=1020))
    logits_BV, memory = stream.extend(config, params, memory, [tokenizer.encode(text)])

Legend: B batch, T tokens, D width, V vocabulary, L layers.
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sinks import models, ops
from sinks.attention import attend, make_plan
from sinks.cache import MAX_LENGTH, Cache, CacheSpec, Layer, check_cache, check_unused, update
from sinks.config import ModelConfig
from sinks.models.layers import Rows
from sinks.sampling import Sampling, sample

Params = dict[str, Any]
Tokens = Sequence[int] | np.ndarray

# Lengths that `extend` compiles for; what is left over is padded to the next.
CHUNKS = (1, 16, 128, 1024)

JOINED = (("q", "k", "v"), ("gate", "up"))  # products of one input


def prepare(params: Params, *, stacked: bool | None = None, int8: bool = False) -> Params:
    """Parameters as decoding reads them fastest.

    Args:
      stacked: blocks on one leading axis, for `lax.scan`, or a tuple of blocks with their weights as `layers.Rows`.
        Default: what `ops.stacks_blocks` says of the devices they lie on.
      int8: weights in 8 bits, in a tuple, with a float32 scale for each output: a quarter of what a token reads. The
        embeddings stay as they are. Activations keep their precision: a product takes each as the sum of two 8-bit numbers.
    """
    blocks, is_stacked = params["blocks"], isinstance(params["blocks"], dict)
    if stacked is None:
        stacked = not int8 and ops.stacks_blocks(params)
    if stacked and int8:
        raise ValueError("int8=True with stacked=True: weights in 8 bits come as a tuple of blocks")
    if int8 and not is_stacked:
        raise ValueError("int8=True: give the parameters as they were loaded, not prepared before")
    if stacked == is_stacked:
        return params
    if stacked:
        return {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
    depth = jax.tree.leaves(blocks)[0].shape[0]
    rows = tuple(_as_rows({name: p[i] for name, p in blocks.items()}, int8) for i in range(depth))
    head = {"unembed": params["unembed"]} if "unembed" in params else {}
    if int8 and not head:
        head = {"unembed": params["embed"].T}
    return {**params, **_as_rows(head, int8), "blocks": rows}


def _as_rows(leaves: Params, int8: bool) -> Params:
    """Weights as Rows, those of one input joined; biases and norms as they are."""
    groups: list[tuple[str, ...]] = [names for names in JOINED if leaves.keys() >= set(names)]
    joined = {name for names in groups for name in names}
    groups += [(name,) for name, p in leaves.items() if p.ndim == 2 and name not in joined]
    out = {name: p for name, p in leaves.items() if p.ndim != 2}
    for names in groups:
        kernels = [leaves[name].T for name in names]
        rows = Rows(jnp.concatenate(kernels), sizes=tuple(map(len, kernels)))
        out["+".join(names)] = rows.quantize() if int8 else rows
    return out


def read(
    config: ModelConfig, params: Params, cache: Cache, tokens_BT: jax.Array, n_B: jax.Array
) -> tuple[jax.Array, Layer]:
    """The last block's output [B, T, D] for T new tokens, and what `cache.update` has to write of them.

    Reading and writing can be two programs (`decode_step`): in one, the compiler copies the ring to be safe.
    """
    x_BTD = models.family(config).embed(config, params, tokens_BT)
    T, dtype = tokens_BT.shape[1], x_BTD.dtype
    plan = make_plan(config, cache.spec, cache.length, cache.evicted, n_B, T, dtype)
    return _run_blocks(config, params, cache.spec, plan, cache, x_BTD)


def hidden(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    n_B: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """The last block's output [B, T, D] for T new tokens, and the cache that has seen them.

    Args:
      n_B: how many of each row's tokens count, from the left; None: all. The rest is padding: it leaves no trace.
    """
    B, T = tokens_BT.shape
    n_B = jnp.full((B,), T, jnp.int32) if n_B is None else n_B
    x_BTD, kept = read(config, params, cache, tokens_BT, n_B)
    return x_BTD, update(cache, kept, n_B)


def hidden_from_start(
    config: ModelConfig, params: Params, spec: CacheSpec, tokens_BT: jax.Array
) -> jax.Array:
    """The last block's output [B, T, D] for texts that begin here, with no cache: training, re-computation.

    Query t sees what the stream with this spec would let it see; recent >= T is ordinary causal attention.
    """
    B, T = tokens_BT.shape
    x_BTD = models.family(config).embed(config, params, tokens_BT)
    zero_B = jnp.zeros(B, jnp.int32)
    plan = make_plan(config, spec, zero_B, zero_B, zero_B + T, T, x_BTD.dtype)
    return _run_blocks(config, params, spec, plan, None, x_BTD)[0]


def unembed(config: ModelConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Logits [B, T, V] of the blocks' output."""
    return models.family(config).unembed(config, params, x_BTD)


def _run_blocks(
    config: ModelConfig, params: Params, spec: CacheSpec, plan, cache, x_BTD
) -> tuple[jax.Array, Any]:
    block = models.family(config).block

    def one_block(x_BTD, p_and_layer):
        p, layer = p_and_layer
        kept = {}

        def attend_here(q, k, v, sink_logit):
            mixed, new = attend(config, spec, plan, layer, q, k, v, sink_logit)
            kept.update(new)
            return mixed

        x_BTD = block(config, p, x_BTD, attend_here)
        return x_BTD, kept if cache is not None else None

    blocks = params["blocks"]
    if isinstance(blocks, dict):
        layers = None if cache is None else cache.sink_kv | cache.ring
        return jax.lax.scan(one_block, x_BTD, (blocks, layers))
    kept = []
    for i, p in enumerate(blocks):
        layer = cache and {x: stack[i] for x, stack in cache.sink_kv.items()} | cache.ring[i]
        x_BTD, new = one_block(x_BTD, (p, layer))
        kept.append(new)
    # Stacked, so that a step hands few arrays from program to program: each costs microseconds.
    return x_BTD, jax.tree.map(lambda *layers: jnp.stack(layers), *kept)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def chunk_step(
    config: ModelConfig, params: Params, cache: Cache, tokens_BT: jax.Array, n_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after each row's n-th new token (meaningless where n is 0), and the cache, which is donated."""
    x_BTD, cache = hidden(config, params, cache, tokens_BT, n_B)
    last = jnp.maximum(n_B - 1, 0)[:, None, None]
    return unembed(config, params, jnp.take_along_axis(x_BTD, last, 1))[:, 0], cache


def extend(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    rows: Sequence[Tokens],
    *,
    chunks: Sequence[int] = CHUNKS,
) -> tuple[jax.Array, Cache]:
    """Streams a text into each row of the cache, however long, exactly as token by token.

    Args:
      cache: donated: use the one returned.
      rows: token ids, one sequence per row; lengths may differ, and be 0 for some.
      chunks: chunk lengths to compile for; together they bound the number of compilations.

    Returns:
      Logits [B, V] after each row's last token (zeros where a row got none), and the cache.

    Raises:
      ValueError: a wrong number of rows, no token at all, a token id outside the vocabulary, a stream longer than 2^31, or
        a cache that was used up before or made for another model.
    """
    texts = [check_tokens(config, row) for row in rows]
    _check_chunks(chunks)
    check_stream(config, params, cache, texts)
    lengths = np.array([len(text) for text in texts])
    logits_BV, done = None, 0
    while done < lengths.max():
        left = lengths.max() - done
        T = next((c for c in sorted(chunks) if c >= left), max(chunks))
        n_B = np.clip(lengths - done, 0, T)
        tokens_BT = np.zeros((len(texts), T), np.int32)
        for b, text in enumerate(texts):
            tokens_BT[b, : n_B[b]] = text[done : done + n_B[b]]
        new_BV, cache = chunk_step(config, params, cache, tokens_BT, n_B.astype(np.int32))
        old_BV = jnp.zeros_like(new_BV) if logits_BV is None else logits_BV
        logits_BV = jnp.where(n_B[:, None] > 0, new_BV, old_BV)
        done += T
    assert logits_BV is not None
    return logits_BV, cache


def _check_chunks(chunks: Any) -> None:
    is_list = isinstance(chunks, Sequence | np.ndarray) and len(chunks) > 0
    if not is_list or not all(isinstance(n, int | np.integer) and n >= 1 for n in chunks):
        raise ValueError(f"chunks={chunks!r}: a list of lengths, at least one, each 1 or more")


def decode_step(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    token_B: jax.Array,
    key: jax.Array,
    sampling: Sampling = Sampling(),
) -> tuple[jax.Array, Cache]:
    """Feeds one token per row and draws the next, int32 [B]. The cache is donated."""
    check_unused(cache)
    next_B, kept = _sample_next(config, params, cache, token_B, key, sampling)
    return next_B, _write(cache, kept)


@partial(jax.jit, static_argnums=(0, 5))
def _sample_next(config, params, cache, token_B, key, sampling):
    x_BTD, kept = read(config, params, cache, token_B[:, None], jnp.ones_like(token_B))
    return sample(unembed(config, params, x_BTD)[:, 0], sampling, key), kept


@partial(jax.jit, donate_argnums=0)
def _write(cache: Cache, kept: Layer) -> Cache:
    return update(cache, kept, jnp.ones_like(cache.length))


class Generation:
    """Tokens drawn one by one, without end: `for token_B in Generation(...)`, and `.cache` at any time.

    The cache has then seen every token but the last one drawn, which the next step feeds. Token i of the stream is drawn
    with fold_in(key, i): the same key and stream give the same tokens, however the loop was interrupted.

    Args:
      cache: donated; what `extend` returned with `logits_BV`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        cache: Cache,
        logits_BV: jax.Array,
        *,
        sampling: Sampling = Sampling(),
        key: jax.Array | None = None,
    ):
        check_cache(config, cache)
        self._config, self._params, self._sampling = config, params, sampling
        self._key = jax.random.key(0) if key is None else key
        self._place = int(jnp.max(cache.length))
        self.cache = cache
        self._next_B = sample(logits_BV, sampling, self._step_key())

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            token_B = self._next_B
            yield np.asarray(token_B)
            self._place += 1
            self._next_B, self.cache = decode_step(
                self._config, self._params, self.cache, token_B, self._step_key(), self._sampling
            )

    def _step_key(self) -> jax.Array:
        return jax.random.fold_in(self._key, self._place)


def check_tokens(config: ModelConfig, tokens: Tokens) -> np.ndarray:
    """Token ids as int32. Raises ValueError naming the first that is not in the vocabulary."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"token ids must be a flat sequence of integers, got {ids.dtype} {ids.shape}"
        )
    wrong = np.flatnonzero((ids < 0) | (ids >= config.vocab_size))
    if wrong.size:
        raise ValueError(
            f"token {ids[wrong[0]]} at place {wrong[0]} is outside the vocabulary of {config.vocab_size}: were the ids "
            "made by another model's tokenizer?"
        )
    return ids.astype(np.int32)


def check_stream(
    config: ModelConfig, params: Params, cache: Cache, rows: Sequence[np.ndarray]
) -> None:
    """Raises ValueError for what cannot be streamed into this cache."""
    check_cache(config, cache)
    batch = cache.length.shape[0]
    if len(rows) != batch:
        raise ValueError(f"the cache holds {batch} streams, got {len(rows)} rows of tokens")
    if not any(len(row) for row in rows):
        raise ValueError("an empty text: give at least one token, such as the tokenizer's bos_id")
    if isinstance(params["blocks"], dict) != isinstance(cache.ring, dict):
        raise ValueError(
            "parameters and cache are laid out differently: use stream.prepare(params) with cache.init(...), or the "
            "same `stacked` for both"
        )
    seen = int(jnp.max(cache.length)) + max(map(len, rows))
    if seen > MAX_LENGTH:
        raise ValueError(
            f"a stream holds {MAX_LENGTH} tokens, this one would have {seen}: start a new one"
        )


def check_spec(config: ModelConfig, spec: CacheSpec) -> None:
    """Warns when queries would stand at positions that the model was never trained for."""
    if spec.capacity >= config.max_positions:
        warnings.warn(
            f"sinks={spec.sinks} + recent={spec.recent} reach position {spec.capacity}, but the model was trained for "
            f"positions 0 to {config.max_positions - 1}: expect worse predictions once the cache is full",
            stacklevel=2,
        )
