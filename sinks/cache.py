"""The key-value cache of an endless stream: S sinks, written once, and a ring of the R newest tokens.

This is layout B of docs/papers/streamingllm.md 1.10. Nothing is ever moved. Token j >= S goes to slot (j - S) mod R and
stays there until it is overwritten, R tokens later. Keys are stored rotated by their true position and never rotated again:
queries are rotated twice instead, by the position t for the ring and by their place in the cache for the sinks
(sinks/attention.py). Attention reads before it writes, so a query sees R past tokens and itself, the paper's S + R + 1
keys, in a cache of exactly C.

All shapes are static; one compiled program serves every length. Rows of a batch have lengths of their own.

Legend: L layers, B batch, G key heads, K head width, S sinks, R ring slots, T new tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jax.tree_util import GetAttrKey

from common.sharding import BATCH_AXES, Rules, shardings
from sinks import ops
from sinks.config import ModelConfig
from sinks.int8 import quantize
from sinks.positions import ring_index

RULES: Rules = {"batch": BATCH_AXES, "heads": "tensor", "layers": None}
MAX_LENGTH = 2**31 - 1  # tokens of one stream: positions are int32

Layer = dict[str, jax.Array]


@dataclass(frozen=True)
class CacheSpec:
    """How much is remembered, and how.

    Attributes:
      sinks: S, the first tokens of the stream, kept forever. 0 is window attention.
      recent: R, past tokens that a query sees besides the sinks and itself. As long as the stream: dense attention.
      dtype: of keys and values.
      int8: keep the ring in 8 bits, with one float32 scale per token and head; the sinks stay in `dtype`. (Scales belong
        to a token, so rotated keys lose no more than unrotated ones: a rotation keeps each pair's length.)
    """

    sinks: int = 4
    recent: int = 1020
    dtype: str = "float32"
    int8: bool = False

    def __post_init__(self):
        for name, size in (("sinks", self.sinks), ("recent", self.recent)):
            if not isinstance(size, int | np.integer) or isinstance(size, bool):
                raise ValueError(f"{name}={size!r}: a whole number")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: 0 or more")
        if self.recent < 1:
            raise ValueError(f"recent={self.recent}: at least 1")
        if self.dtype not in ("bfloat16", "float16", "float32", "float64"):
            raise ValueError(f"cache dtype {self.dtype!r}: bfloat16, float16, float32 or float64")

    @property
    def capacity(self) -> int:
        """C = S + R: the tokens that the cache holds."""
        return self.sinks + self.recent

    def nbytes(self, config: ModelConfig, batch: int = 1) -> int:
        """Exactly the bytes of the cache: 2 L B G (S K b + R K b), plus two counters per row.

        In int8: 2 L B G (S K b + R (K + 4)).
        """
        width = config.head_dim * jnp.dtype(self.dtype).itemsize
        slot = config.head_dim + 4 if self.int8 else width
        layers = 2 * config.depth * batch * config.kv_heads
        return layers * (self.sinks * width + self.recent * slot) + 8 * batch


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Cache:
    """The state of B streams: a pytree to donate, save and shard.

    Attributes:
      sink_kv: {"sink_k", "sink_v"}, [L, B, G, S, K].
      ring: {"k", "v" [B, G, R, K]}, with int8 {"k_scale", "v_scale" [B, G, R]} too; every array stacked over layers
        [L, ...], or a tuple of L such dicts (see `init`).
      length: tokens seen, int32 [B].
      evicted: tokens evicted in blocks beyond what streaming itself forgets, int32 [B] (sinks/policies.py).
    """

    sink_kv: Layer
    ring: Layer | tuple[Layer, ...]
    length: jax.Array
    evicted: jax.Array
    spec: CacheSpec

    def tree_flatten(self) -> tuple[tuple, CacheSpec]:
        return (self.sink_kv, self.ring, self.length, self.evicted), self.spec

    def tree_flatten_with_keys(self) -> tuple[tuple, CacheSpec]:
        names = ("sinks", "ring", "length", "evicted")  # in streams that are saved already
        return tuple(zip(map(GetAttrKey, names), self.tree_flatten()[0])), self.spec

    @classmethod
    def tree_unflatten(cls, spec: CacheSpec, leaves: tuple) -> "Cache":
        return cls(*leaves, spec=spec)


def abstract(
    config: ModelConfig, spec: CacheSpec, batch: int = 1, *, stacked: bool = True
) -> Cache:
    """The cache as shapes."""
    G, K, S, R = config.kv_heads, config.head_dim, spec.sinks, spec.recent
    dtype = jnp.dtype(spec.dtype)
    if dtype != jax.dtypes.canonicalize_dtype(dtype):  # would be float32 silently
        raise ValueError("cache dtype 'float64' needs JAX's 64-bit mode: jax.enable_x64(True)")
    shape: Any = jax.ShapeDtypeStruct  # in the places of arrays
    rows = (config.depth, batch, G)
    sink = shape((*rows, S, K), dtype)
    lead = rows if stacked else rows[1:]
    slot = shape((*lead, R, K), jnp.dtype(jnp.int8) if spec.int8 else dtype)
    layer = {"k": slot, "v": slot}
    if spec.int8:
        scale = shape((*lead, R), jnp.dtype(jnp.float32))
        layer |= {"k_scale": scale, "v_scale": scale}
    ring = layer if stacked else (layer,) * config.depth
    count = shape((batch,), jnp.dtype(jnp.int32))
    return Cache({"sink_k": sink, "sink_v": sink}, ring, count, count, spec)


def init(
    config: ModelConfig, spec: CacheSpec, batch: int = 1, *, stacked: bool | None = None
) -> Cache:
    """An empty cache for `batch` streams.

    Args:
      stacked: the ring's layers on one leading axis, for `lax.scan` (small programs), or a tuple of them (no slice is
        ever copied). Must match the parameters' blocks; default: what `stream.prepare` chooses (sinks/ops.py).

    Raises:
      ValueError: there is no memory for it.
    """
    if stacked is None:
        stacked = ops.stacks_blocks()
    shapes = abstract(config, spec, batch, stacked=stacked)
    try:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    except (
        jax.errors.JaxRuntimeError,
        MemoryError,
        TypeError,
    ) as error:  # the last: beyond 64 bits
        raise ValueError(
            f"sinks={spec.sinks}, recent={spec.recent}: the cache would need {spec.nbytes(config, batch):,} bytes, which "
            "the device does not have. Take a smaller recent"
        ) from error


def restack(cache: Cache, stacked: bool) -> Cache:
    """The same cache with the ring's layers on one leading axis, or as a tuple (see `init`)."""
    if isinstance(cache.ring, dict) == stacked:
        return cache
    if isinstance(cache.ring, dict):
        depth = cache.ring["k"].shape[0]
        return replace(
            cache, ring=tuple({x: p[i] for x, p in cache.ring.items()} for i in range(depth))
        )
    return replace(cache, ring=jax.tree.map(lambda *layers: jnp.stack(layers), *cache.ring))


def check_cache(config: ModelConfig, cache: Cache) -> None:
    """Raises ValueError for a cache that an earlier call has used up, or that was made for another model."""
    check_unused(cache)
    stacked = isinstance(cache.ring, dict)
    want = abstract(config, cache.spec, cache.length.shape[0], stacked=stacked)
    describe = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    if describe(cache) != describe(want):
        layers, _, heads, _, width = cache.sink_kv["sink_k"].shape
        raise ValueError(
            f"this cache was made for another model: it holds {layers} layers of {heads} key heads of width {width}, and "
            f"the model has {config.depth} of {config.kv_heads} of width {config.head_dim}. Make one with cache.init"
        )


def check_unused(cache: Cache) -> None:
    """Raises ValueError for a cache whose arrays an earlier call has taken over."""
    leaves = [cache.length, cache.evicted, *cache.sink_kv.values()]
    if any(
        isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()
        for leaf in leaves
    ):
        raise ValueError(
            "this cache was used up by an earlier call, which overwrote it: use the cache that extend returned"
        )


def logical_axes(cache: Cache) -> Cache:
    """The logical axes of every array: rows over "batch", key heads over "heads"."""

    def axes(leaf: Any, *lead: str) -> tuple[str | None, ...]:
        names = (*lead, "batch", "heads")
        return names + (None,) * (leaf.ndim - len(names))

    stacked = {x: axes(leaf, "layers") for x, leaf in cache.sink_kv.items()}
    if isinstance(cache.ring, tuple):
        ring = tuple({x: axes(leaf) for x, leaf in layer.items()} for layer in cache.ring)
    else:
        ring = {x: axes(leaf, "layers") for x, leaf in cache.ring.items()}
    return replace(cache, sink_kv=stacked, ring=ring, length=("batch",), evicted=("batch",))


def cache_shardings(cache: Cache, mesh: Mesh, rules: Rules = RULES) -> Cache:
    """NamedShardings for the cache (arrays or shapes). Raises ValueError where the mesh does not divide it."""
    return shardings(cache, logical_axes(cache), mesh, rules)


def write_sinks(
    old_BGSK: jax.Array, new_BGTK: jax.Array, start_B: jax.Array, n_B: jax.Array
) -> jax.Array:
    """The sinks after tokens start .. start+n-1, the first n_B of `new`: those among the first S are put in place."""
    S, T = old_BGSK.shape[2], new_BGTK.shape[2]
    source_BS = jnp.arange(S) - start_B[:, None]
    picked = jnp.take_along_axis(new_BGTK, jnp.clip(source_BS, 0, T - 1)[:, None, :, None], axis=2)
    is_new = (source_BS >= 0) & (source_BS < n_B[:, None])
    return jnp.where(is_new[:, None, :, None], picked.astype(old_BGSK.dtype), old_BGSK)


def write_ring(
    old: jax.Array, new: jax.Array, n_sinks: int, start_B: jax.Array, n_B: jax.Array
) -> jax.Array:
    """The ring after tokens start .. start+n-1, the first n_B of `new`.

    Args:
      old: [B, G, R, ...]; new: [B, G, T, ...], of the same type.
    """
    R, T = old.shape[2], new.shape[2]

    def one_token(old, new, start, n):
        """Writes the slot in place; rewrites what is there when there is nothing to write."""
        slot = (start - n_sinks) % R
        keep = (n == 0) | (start < n_sinks)
        here = jax.lax.dynamic_slice_in_dim(old, slot, 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(keep, here, new), slot, axis=1)

    def chunk(old, new, start, n):
        source = ring_index(start + n, n_sinks, R) - start
        is_new = (source >= 0).reshape(R, *[1] * (old.ndim - 2))
        return jnp.where(is_new, jnp.take(new, jnp.clip(source, 0, T - 1), axis=1), old)

    return jax.vmap(one_token if T == 1 else chunk)(old, new, start_B, n_B)


def encode_kv(spec: CacheSpec, k: jax.Array, v: jax.Array) -> Layer:
    """Keys and values [..., K] as the ring stores them: {"k", "v"}, and with int8 {"k_scale", "v_scale"} [...]."""
    if not spec.int8:
        return {"k": k, "v": v}
    (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
    return {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}


def decode_kv(spec: CacheSpec, layer: Layer) -> tuple[jax.Array, jax.Array]:
    """The inverse of `encode_kv`, up to rounding: k, v in the cache's dtype."""
    if not spec.int8:
        return layer["k"], layer["v"]
    k, v = ((layer[x] * layer[f"{x}_scale"][..., None]).astype(spec.dtype) for x in ("k", "v"))
    return k, v


def update(cache: Cache, kept: Layer, n_B: jax.Array) -> Cache:
    """The cache after a chunk: `kept` is what attention returned for every layer, stacked."""
    S, start_B = cache.spec.sinks, cache.length

    def one_layer(old: Layer, new: Layer) -> Layer:
        return {x: write_ring(old[x], new[x], S, start_B, n_B) for x in old}

    if isinstance(cache.ring, tuple):
        news = ({x: new[i] for x, new in kept.items()} for i in range(len(cache.ring)))
        ring = tuple(map(one_layer, cache.ring, news))
    else:
        ring = jax.vmap(one_layer)(cache.ring, kept)
    sink_kv = {x: kept[x] for x in cache.sink_kv}
    return replace(cache, sink_kv=sink_kv, ring=ring, length=start_B + n_B)
