"""What is remembered of a long text: the paper's four ways and the official chat's, behind one interface.

Defined in docs/papers/streamingllm.md 1.7:

  dense              every past token, at its true distance. Memory grows, and quality ends with the trained length.
  window             keys and values of the last R tokens. Breaks when token 0 leaves.
  recompute          for every token a fresh pass over the last R. The oracle of quality, R times the work.
  sinks              S sinks and the last R tokens: the paper.
  evict_for_space    sinks, but room is made for whole blocks (chat turns), which then attend to all that is kept.
                     A text has no turns: every `block` tokens are one.

Legend: B batch, T tokens of a chunk, L window, D width.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from sinks import cache, stream
from sinks.cache import Cache, CacheSpec
from sinks.config import ModelConfig

Params = dict[str, Any]
POLICIES = ("dense", "window", "recompute", "sinks", "evict_for_space")
BLOCK = 256  # tokens of a turn, where a text has none
UNEMBED_ROWS = 128  # tokens whose logits exist at a time


class CachePolicy(Protocol):
    """Scores a stream chunk by chunk. Implementations are frozen and hashable: static arguments of one jitted step.

    Attributes:
      block: no chunk may reach over a multiple of it; 0: chunks may lie anywhere. Scores do not depend on the chunks.
    """

    @property
    def block(self) -> int: ...

    def init(self, config: ModelConfig) -> Any:
        """The state before the first token: a pytree of arrays, of a size that stays."""
        ...

    def score(
        self,
        config: ModelConfig,
        params: Params,
        state: Any,
        tokens_T: jax.Array,
        targets_T: jax.Array,
        n: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """-log p(target) [T] in nats for the first n tokens, which of them were scored [T], and the next state."""
        ...


@dataclass(frozen=True)
class Cached:
    """Policies that keep keys and values: dense, window and sinks, by their `spec`.

    Attributes:
      block: before each block of so many tokens, room is made for all of it (`evict_for_space`), and none of its tokens
        evicts another. 0: token by token.
    """

    spec: CacheSpec
    block: int = 0

    def __post_init__(self):
        if not 0 <= self.block < self.spec.recent:
            raise ValueError(
                f"block={self.block}: 0 (off) or more, and below the {self.spec.recent} recent tokens of the cache, or else "
                "every block begins with the sinks alone. Take a larger cache or shorter blocks"
            )

    def init(self, config: ModelConfig) -> Cache:
        return cache.init(config, self.spec, 1, stacked=True)

    def score(self, config, params, state, tokens_T, targets_T, n, key):
        del key
        if self.block:
            begins = state.length[0] % self.block == 0
            room = evict_for_space(state, self.block)
            state = replace(state, evicted=jnp.where(begins, room.evicted, state.evicted))
        x_BTD, state = stream.hidden(config, params, state, tokens_T[None], n[None])
        nll_T = token_nll(config, params, x_BTD[0], targets_T)
        return nll_T, jnp.arange(len(tokens_T)) < n, state


@dataclass(frozen=True)
class Recompute:
    """Every prediction from a fresh pass over the last `length` tokens, which starts at position 0.

    Attributes:
      sample: predictions per chunk, at random places; None takes all of them (`length` times the work of a normal pass).
      batch: windows computed together.
    """

    length: int
    sample: int | None = None
    batch: int = 8

    @property
    def block(self) -> int:
        return 0

    def init(self, config: ModelConfig) -> dict[str, jax.Array]:
        return {"history": jnp.zeros(self.length, jnp.int32), "seen": jnp.int32(0)}

    def score(self, config, params, state, tokens_T, targets_T, n, key):
        T, L = len(tokens_T), self.length
        known = jnp.concatenate([state["history"], tokens_T])
        order = jnp.where(jnp.arange(T) < n, jax.random.uniform(key, (T,)), 2.0)
        places = jnp.argsort(order)[: self.sample or T]

        def one(place):
            """The window that ends at `place`, shorter while the stream is."""
            length = jnp.minimum(state["seen"] + place + 1, L)
            first = L + place + 1 - length
            return known[jnp.minimum(first + jnp.arange(L), L + T - 1)], length - 1

        def windows(places):
            tokens_BL, last_B = jax.vmap(one)(places)
            x_BLD = stream.hidden_from_start(config, params, CacheSpec(0, L), tokens_BL)
            x_BD = jnp.take_along_axis(x_BLD, last_B[:, None, None], 1)[:, 0]
            return token_nll(config, params, x_BD, targets_T[places])

        count = len(places)
        padded = jnp.pad(places, (0, -count % self.batch))
        nll = jax.lax.map(windows, padded.reshape(-1, self.batch)).reshape(-1)[:count]
        nll_T = jnp.zeros(T, nll.dtype).at[places].set(nll)
        scored_T = jnp.zeros(T, bool).at[places].set(places < n)
        history = jax.lax.dynamic_slice_in_dim(known, n, L)
        return nll_T, scored_T, {"history": history, "seen": state["seen"] + n}


def make_policy(
    name: str,
    *,
    cache_size: int = 1024,
    sinks: int = 4,
    sample: int | None = None,
    block: int = BLOCK,
    **spec: Any,
) -> CachePolicy:
    """A policy by name, with a cache of `cache_size` tokens in all (S + R), as the paper writes "4+1020".

    Args:
      sinks: for "sinks" and "evict_for_space"; others have none.
      sample: for "recompute".
      block: for "evict_for_space", tokens of a turn; below `cache_size - sinks`.
      spec: dtype and int8 of CacheSpec. For "dense", cache_size is the longest text.
    """
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is unknown; known: {', '.join(POLICIES)}")
    if name == "recompute":
        return Recompute(cache_size, sample)
    if name in ("dense", "window"):
        sinks = 0
    if cache_size <= sinks:
        raise ValueError(
            f"cache_size={cache_size} leaves no room next to sinks={sinks}: enlarge it"
        )
    block = block if name == "evict_for_space" else 0
    return Cached(CacheSpec(sinks, cache_size - sinks, **spec), block)


def evict_for_space(cache: Cache, coming: jax.Array | int) -> Cache:
    """Forgets as many recent tokens as leave room for `coming` more, as the official chat does before each turn.

    If the room is there, nothing goes; if even an emptied ring would be too small, all but the sinks goes (the
    official cache then overflows; this one streams).
    """
    spec = cache.spec
    needed = jnp.minimum(cache.length + coming - spec.capacity, cache.length - spec.sinks)
    return replace(cache, evicted=jnp.maximum(cache.evicted, needed))


def evict_before(cache: Cache, j: jax.Array | int) -> Cache:
    """Forgets all between the sinks and token j, such as whole messages up to where one begins."""
    return replace(cache, evicted=jnp.maximum(cache.evicted, j - cache.spec.sinks))


def token_nll(
    config: ModelConfig, params: Params, x_TD: jax.Array, targets_T: jax.Array
) -> jax.Array:
    """-log p(target) in nats, [T], from the blocks' output, a few rows of logits at a time."""
    T = len(targets_T)
    rows = min(UNEMBED_ROWS, T)

    def some(x_and_targets):
        x_RD, targets_R = x_and_targets
        logits_RV = stream.unembed(config, params, x_RD[None])[0]
        picked_R = jnp.take_along_axis(logits_RV, targets_R[:, None], 1)[:, 0]
        return jax.nn.logsumexp(logits_RV, -1) - picked_R

    pad = -T % rows
    x = jnp.pad(x_TD, ((0, pad), (0, 0))).reshape(-1, rows, x_TD.shape[1])
    targets = jnp.pad(targets_T, (0, pad)).reshape(-1, rows)
    return jax.lax.map(some, (x, targets)).reshape(-1)[:T]


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def score_chunk(
    config: ModelConfig,
    policy: CachePolicy,
    params: Params,
    state: Any,
    tokens_T: jax.Array,
    targets_T: jax.Array,
    n: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, Any]:
    """`policy.score`, compiled once for each policy and chunk length; the state is donated."""
    return policy.score(config, params, state, tokens_T, targets_T, n, key)
