"""A stream in chunks is the paper's token-by-token stream, exactly."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinks import attention, perplexity, policies, stream
from sinks.cache import CacheSpec, init
from tests.sinks import reference, small

PAD = 12


@st.composite
def ragged_cuts(draw):
    """Lengths of three rows, and the tokens of each row in each chunk."""
    lengths = draw(st.lists(st.integers(0, 26), min_size=3, max_size=3).filter(any))
    left, cuts = list(lengths), []
    while any(left):
        longest = draw(st.sampled_from([1, 1, 2, PAD]))
        cut = [draw(st.integers(0, min(n, longest))) for n in left]
        if any(cut):
            cuts.append(cut)
            left = [n - c for n, c in zip(left, cut)]
    return lengths, cuts


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, sinks, recent, stacked",
    [
        (dict(), 4, 5, True),
        (dict(kv_heads=1), 0, 1, True),
        (dict(kv_heads=4, rope_fraction=0.5), 1, 3, False),
        (dict(alibi=True, rope_theta=0.0), 2, 6, True),
        (dict(sink_logits="zero"), 0, 7, True),
        (dict(sink_logits="learned", tie_embeddings=False), 5, 1, True),
        (dict(kv_heads=4), 3, 40, True),
    ],
)
def test_chunks_of_any_length_equal_the_papers_stream(model, sinks, recent, stacked, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 5)  # several blocks in a chunk of 12
    c = small.config(**model)

    @settings(max_examples=5, deadline=None, derandomize=True, database=None)
    @given(ragged_cuts())
    def check(case):
        lengths, cuts = case
        p = small.params(c, jnp.float64)
        rng = np.random.default_rng(sum(lengths))
        rows = [rng.integers(0, c.vocab_size, n) for n in lengths]
        spec = CacheSpec(sinks, recent, dtype="float64")
        laid_out = stream.prepare(p, stacked=stacked)
        got, cache = small.stream_logits(c, laid_out, spec, rows, cuts, PAD)
        assert list(cache.length) == lengths
        for row, logits in zip(rows, got):
            if len(row):
                want = reference.stream(c, p, row, sinks, recent)
                np.testing.assert_allclose(logits, want, rtol=0, atol=1e-10)

    with jax.enable_x64(True):
        check()


@pytest.mark.slow
def test_recent_tokens_are_counted_as_the_paper_counts_them():
    """Past the fill, a query sees S sinks, R past tokens and itself: S + R + 1, not S + R."""
    with jax.enable_x64(True):
        c = small.config(depth=1)
        p = small.params(c, jnp.float64)
        tokens = np.random.default_rng(0).integers(0, c.vocab_size, 12)
        last = lambda text: small.stream_logits(  # noqa: E731
            c, p, CacheSpec(2, 4, dtype="float64"), [text], [[1]] * 12
        )[0][0][-1]
        seen = []
        for i in range(12):
            other = tokens.copy()
            other[i] = (other[i] + 1) % c.vocab_size
            if not np.allclose(last(other), last(tokens), atol=1e-12):
                seen.append(i)
    assert seen == [0, 1, 7, 8, 9, 10, 11]


@pytest.mark.slow
def test_positions_stay_exact_beyond_two_to_the_24():
    """Far along, a stream gives what the same cache gave early on: only relative positions matter, and none is lost."""
    c = small.config(rope_theta=10_000.0, depth=1)
    p = small.params(c)
    spec = CacheSpec(2, 6)
    rows = [np.random.default_rng(0).integers(0, c.vocab_size, 20)]

    def run(offset):
        cache = init(c, spec, 1, stacked=True)
        # As if `offset` tokens, a multiple of R, had passed after the sinks: none of them is left to be seen.
        _, cache = stream.extend(c, p, cache, [rows[0][:2]], chunks=(1,))
        cache = replace(cache, length=cache.length + offset)
        out = []
        for token in rows[0][2:]:
            logits, cache = stream.extend(c, p, cache, [[token]], chunks=(1,))
            out.append(logits)
        return np.concatenate(out)[6:]

    near, far = run(60), run(6 * 2**28)
    np.testing.assert_allclose(far, near, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_text_in_any_number_of_chunks_goes_through_extend():
    c = small.config()
    p, spec = small.params(c), CacheSpec(3, 5)
    rows = [np.arange(30) % 17, np.arange(7) % 17, np.array([], int)]
    logits, cache = stream.extend(c, p, init(c, spec, 3, stacked=True), rows, chunks=(1, 4, 8))
    assert list(cache.length) == [30, 7, 0]
    for row, got in zip(rows[:2], logits):
        want, _ = stream.extend(c, p, init(c, spec, 1, stacked=True), [row], chunks=(1,))
        np.testing.assert_allclose(got, want[0], atol=1e-5)
    assert not logits[2].any()


def test_one_program_serves_every_length():
    c = small.config(vocab_size=19)
    p = small.params(c)
    cache = init(c, CacheSpec(2, 5), 1, stacked=True)
    before = stream.chunk_step._cache_size()
    for n in (1, 3, 30, 1, 17):
        _, cache = stream.extend(c, p, cache, [np.zeros(n, int)], chunks=(1, 4))
    assert stream.chunk_step._cache_size() == before + 2  # one per chunk length


@pytest.mark.slow
def test_memory_does_not_grow_along_the_stream():
    """100,000 tokens in chunks, and a few hundred drawn one by one, leave as many bytes as the first ones did."""
    c = small.config(depth=1)
    p = small.params(c)
    cache, key = init(c, CacheSpec(2, 30), 1, stacked=True), jax.random.key(0)
    token, held = jnp.zeros(1, jnp.int32), []
    for length in (1_000, 100_000):
        text = np.zeros(length - int(cache.length[0]), int)
        _, cache = stream.extend(c, p, cache, [text], chunks=(1000,))
        for _ in range(200):
            token, cache = stream.decode_step(c, p, cache, token, key)
        held.append(sum(x.nbytes for x in jax.live_arrays()))
    assert held[1] == held[0]
    assert jnp.isfinite(cache.ring["v"]).all()


@pytest.mark.parametrize(
    "rows, message",
    [
        ([[]], "empty text"),
        ([[3, 17]], "token 17 at place 1 is outside the vocabulary of 17"),
        ([[-1]], "token -1"),
        ([[1], [2]], "holds 1 streams, got 2"),
        ([[0.5]], "integers"),
    ],
)
def test_what_cannot_be_streamed_is_refused(rows, message):
    c = small.config()
    cache = init(c, CacheSpec(2, 5), 1, stacked=True)
    with pytest.raises(ValueError, match=message):
        stream.extend(c, small.params(c), cache, rows)


@pytest.mark.parametrize("spec", [CacheSpec(2, 5), CacheSpec(0, 5)], ids=["sinks", "window"])
def test_a_cache_that_was_used_up_is_named(spec):
    """It is donated: what `extend` returned takes its place."""
    c = small.config()
    p, old = small.params(c), init(c, spec, 1, stacked=True)
    logits, new = stream.extend(c, p, old, [[1]], chunks=(1,))
    policy = policies.Cached(spec)
    for use in (
        lambda: stream.extend(c, p, old, [[2]], chunks=(1,)),
        lambda: stream.decode_step(c, p, old, jnp.zeros(1, jnp.int32), jax.random.key(0)),
        lambda: stream.Generation(c, p, old, logits),
        lambda: next(perplexity.score(c, p, policy, [1, 2], state=old)),
    ):
        with pytest.raises(ValueError, match=r"used up .* use the cache that extend returned"):
            use()
    stream.extend(c, p, new, [[2]], chunks=(1,))


@pytest.mark.parametrize(
    "other", [dict(depth=3), dict(kv_heads=1), dict(head_dim=8)], ids=lambda x: next(iter(x))
)
def test_a_cache_of_another_model_is_named(other):
    c = small.config()
    cache = init(small.config(**other), CacheSpec(2, 5), 1, stacked=True)
    with pytest.raises(ValueError, match=r"cache was made for another model: .* Make one with"):
        stream.extend(c, small.params(c), cache, [[1]])


@pytest.mark.parametrize("chunks", [(), (0, 4), (-1,), 5, (2.5,)])
def test_chunks_without_a_length_are_refused(chunks):
    c = small.config()
    cache = init(c, CacheSpec(2, 5), 1, stacked=True)
    with pytest.raises(ValueError, match=r"chunks=.*a list of lengths, at least one"):
        stream.extend(c, small.params(c), cache, [[1]], chunks=chunks)


def test_layouts_that_do_not_fit_and_streams_too_long_are_refused():
    c = small.config()
    p = small.params(c)
    with pytest.raises(ValueError, match="laid out differently"):
        stream.extend(c, p, init(c, CacheSpec(2, 5), 1, stacked=False), [[1]])
    cache = init(c, CacheSpec(2, 5), 1, stacked=True)
    cache = replace(cache, length=cache.length + (2**31 - 2))
    with pytest.raises(ValueError, match="start a new one"):
        stream.extend(c, p, cache, [[1, 2]])


def test_a_cache_beyond_the_trained_positions_warns():
    c = small.config(max_positions=64)
    with pytest.warns(UserWarning, match="sinks=4 \\+ recent=60 reach position 64"):
        stream.check_spec(c, CacheSpec(4, 60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream.check_spec(c, CacheSpec(4, 59))
