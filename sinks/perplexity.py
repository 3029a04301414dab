"""The perplexity of long texts under a policy, chunk by chunk: millions of tokens, exactly as token by token.

Legend: N tokens of the text, T tokens of a chunk.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from sinks.cache import Cache, check_cache
from sinks.config import ModelConfig
from sinks.policies import CachePolicy, score_chunk
from sinks.stream import Tokens, check_tokens


@dataclass(frozen=True)
class Tally:
    """Sums over scored predictions, in float64 on the host.

    Attributes:
      nll, squares: sums of -log p (nats) and of its square; count: how many.
    """

    nll: float = 0.0
    squares: float = 0.0
    count: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.nll + other.nll, self.squares + other.squares, self.count + other.count)

    @staticmethod
    def of(nll: np.ndarray) -> "Tally":
        nll = np.asarray(nll, np.float64)
        return Tally(float(nll.sum()), float((nll**2).sum()), nll.size)

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nll / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        return math.inf if self.mean > 700 else math.exp(self.mean)

    @property
    def standard_error(self) -> float:
        """The standard error of `mean`, as if the predictions were drawn at random: what a sample says of the rest."""
        if self.count < 2:
            return math.nan
        variance = max(0.0, self.squares / self.count - self.mean**2)
        return math.sqrt(variance / (self.count - 1))


class Piece(NamedTuple):
    """One chunk's result.

    Attributes:
      first: place in the text of the chunk's first token; the prediction at place i is of token i + 1.
      nll: [T] nats, 0 where not scored; scored: [T].
      next: place after the chunk; state: the policy's, then. Together they continue the stream.
    """

    first: int
    nll: np.ndarray
    scored: np.ndarray
    next: int
    state: Any


def score(
    config: ModelConfig,
    params: dict[str, Any],
    policy: CachePolicy,
    tokens: Tokens,
    *,
    chunk: int = 1024,
    first: int = 0,
    state: Any = None,
    seed: int = 0,
) -> Iterator[Piece]:
    """Scores every next token of a text of N tokens (N - 1 predictions), chunk by chunk.

    Args:
      params: with stacked blocks.
      first, state: a Piece's `next` and `state`, to go on from there. The state is used up: each Piece's is
        overwritten when the next one is asked for.
      seed: of the places that a sampling policy draws; they depend on (seed, place) alone.

    Raises:
      ValueError: fewer than two tokens, or ids outside the vocabulary.
    """
    ids = check_tokens(config, tokens)
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens predicts nothing: give at least 2")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: at least 1")
    state = policy.init(config) if state is None else state
    if isinstance(state, Cache):
        check_cache(config, state)
    key = jax.random.key(seed)
    place, block = first, policy.block
    chunk = min(chunk, block) if block else chunk
    while place < len(ids) - 1:
        n = min(chunk, len(ids) - 1 - place, block - place % block if block else chunk)
        window = np.zeros(chunk + 1, np.int32)
        window[: n + 1] = ids[place : place + n + 1]
        nll, scored, state = score_chunk(
            config, policy, params, state, window[:-1], window[1:], np.int32(n), jax.random.fold_in(key, place)
        )  # fmt: skip
        scored = np.asarray(scored)
        yield Piece(place, np.where(scored, nll, 0), scored, place + n, state)
        place += n
