"""Drawing tokens, and generation that is the same however it is interrupted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinks import cache, stream
from sinks.cache import CacheSpec
from sinks.sampling import Sampling, sample
from tests.sinks import small

LOGITS = jnp.log(jnp.array([[0.5, 0.05, 0.3, 0.15]]))


def frequencies(sampling: Sampling, n: int = 4000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), n)
    tokens = jax.vmap(lambda key: sample(LOGITS, sampling, key)[0])(keys)
    return np.bincount(tokens, minlength=4) / n


@pytest.mark.parametrize(
    "sampling, want",
    [
        (Sampling(0.0), [1, 0, 0, 0]),
        (Sampling(1.0), [0.5, 0.05, 0.3, 0.15]),
        (Sampling(1.0, top_k=2), [0.625, 0, 0.375, 0]),
        (Sampling(1.0, top_p=0.6), [0.625, 0, 0.375, 0]),
        (Sampling(1.0, top_p=1e-6), [1, 0, 0, 0]),
        (Sampling(0.5), [0.6849, 0.0068, 0.2466, 0.0616]),
    ],
)
def test_tokens_are_drawn_with_these_probabilities(sampling, want):
    np.testing.assert_allclose(frequencies(sampling), want, atol=0.03)


@pytest.mark.parametrize(
    "wrong",
    [
        *(dict(temperature=t) for t in (-1.0, np.nan, np.inf, 1e-40, 1e9)),
        *(dict(top_k=k) for k in (-1, 2.5, np.nan, np.inf, 2**31)),
        *(dict(top_p=p) for p in (0.0, -0.1, 1.1, np.nan, np.inf)),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.slow
def test_generation_is_the_stream_and_can_be_interrupted():
    c, spec = small.config(), CacheSpec(2, 5)
    p = small.params(c)

    def begin():
        return stream.extend(c, p, cache.init(c, spec, 1, stacked=True), [[3, 1, 4]], chunks=(4,))

    logits, state = begin()
    generation = stream.Generation(c, p, state, logits)
    first = [int(token[0]) for token in itertools.islice(generation, 4)]
    # The cache has seen all but the token drawn last: feeding it gives the same continuation.
    logits, state = stream.extend(c, p, generation.cache, [first[3:]], chunks=(1, 4))
    rest = [int(t[0]) for t in itertools.islice(stream.Generation(c, p, state, logits), 6)]
    logits, state = begin()
    whole = [int(t[0]) for t in itertools.islice(stream.Generation(c, p, state, logits), 10)]
    assert first + rest == whole
    logits, _ = begin()
    assert whole[0] == int(jnp.argmax(logits))
