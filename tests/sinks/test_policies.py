"""Policies against their definitions, and perplexity that does not depend on how a text is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinks import cache, perplexity, policies
from sinks.cache import CacheSpec
from tests.sinks import reference, small

C = small.config()
TOKENS = np.random.default_rng(1).integers(0, C.vocab_size, 33)


def nll(policy, tokens=TOKENS, p=None, **kw):
    pieces = list(perplexity.score(C, p or small.params(C), policy, tokens, **kw))
    return np.concatenate([x.nll[x.scored] for x in pieces])


def from_logits(logits, tokens=TOKENS):
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -logp[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, sinks, recent", [("dense", 0, 40), ("window", 0, 8), ("sinks", 3, 5)]
)
def test_cached_policies_follow_the_paper(name, sinks, recent):
    policy = policies.make_policy(name, cache_size=sinks + recent, sinks=sinks)
    want = from_logits(reference.stream(C, small.params(C), TOKENS, sinks, recent))
    for chunk in (7, 40):
        np.testing.assert_allclose(nll(policy, chunk=chunk), want, atol=1e-4)


def test_recompute_is_a_fresh_pass_over_each_window():
    length, p = 6, small.params(C)
    want = [
        from_logits(
            reference.stream(C, p, TOKENS[max(0, t + 1 - length) : t + 1], 0, length)[-1:],
            TOKENS[t : t + 2],
        )
        for t in range(len(TOKENS) - 1)
    ]
    got = nll(policies.Recompute(length, batch=5), chunk=9)
    np.testing.assert_allclose(got, np.concatenate(want), atol=1e-4)


def test_a_sample_of_recompute_is_drawn_from_the_exact_one():
    exact = nll(policies.Recompute(6), chunk=16)
    sampled = [
        x.first + np.flatnonzero(x.scored)
        for x in perplexity.score(C, small.params(C), policies.Recompute(6, 5), TOKENS, chunk=16)
    ]
    assert [len(places) for places in sampled] == [5, 5]
    got = nll(policies.Recompute(6, sample=5), chunk=16)
    np.testing.assert_allclose(got, exact[np.concatenate(sampled)], atol=1e-5)


@pytest.mark.slow
def test_evict_for_space_is_the_official_chats():
    """Turns of 6, 9, 2 and 8 tokens in a cache of 3 + 10, as in the reference written from the official code."""
    sinks, recent, turns = 3, 10, (6, 9, 2, 8)
    starts = np.cumsum((0, *turns))
    p, spec = small.params(C), CacheSpec(sinks, recent)
    tokens = TOKENS[: starts[-1]]
    want = reference.stream(C, p, tokens, sinks, recent, dict(zip(starts.tolist(), turns)))
    state, got = cache.init(C, spec, 1, stacked=True), []
    for start, n in zip(starts, turns):
        state = policies.evict_for_space(state, n)
        chunk = jnp.asarray(np.resize(tokens[start : start + n], 9))[None]
        logits, state = small.chunk_logits(C, p, state, chunk, jnp.array([n]))
        got.append(logits[0, :n])
    np.testing.assert_allclose(np.concatenate(got), want, atol=1e-4)


@pytest.mark.slow
def test_evict_for_space_is_the_same_however_the_text_is_cut():
    """Every 4 tokens are a turn, as in the reference; chunks are a matter of speed, and a stream may be continued."""
    sinks, recent, block = 3, 10, 4
    p = small.params(C)
    turns = {start: block for start in range(0, len(TOKENS), block)}
    want = from_logits(reference.stream(C, p, TOKENS, sinks, recent, turns))
    policy = policies.make_policy("evict_for_space", cache_size=13, sinks=sinks, block=block)
    for chunk in (3, 4, 40):
        np.testing.assert_allclose(nll(policy, p=p, chunk=chunk), want, atol=1e-4)
    pieces = perplexity.score(C, p, policy, TOKENS, chunk=3)
    half = [next(pieces) for _ in range(5)]
    saved = jax.tree.map(jnp.copy, half[-1].state)
    rest = perplexity.score(C, p, policy, TOKENS, chunk=40, first=half[-1].next, state=saved)
    got = np.concatenate([x.nll[x.scored] for x in (*half, *rest)])
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_stream_continues_where_it_stood():
    policy = policies.make_policy("sinks", cache_size=8, sinks=2)
    p = small.params(C)
    whole = nll(policy, p=p, chunk=5)
    pieces = perplexity.score(C, p, policy, TOKENS, chunk=5)
    half = [next(pieces) for _ in range(3)]
    saved = jax.tree.map(jnp.copy, half[-1].state)
    rest = perplexity.score(C, p, policy, TOKENS, chunk=5, first=half[-1].next, state=saved)
    got = np.concatenate([x.nll[x.scored] for x in (*half, *rest)])
    np.testing.assert_array_equal(got, whole)


def test_tallies_add_up():
    values = np.random.default_rng(0).exponential(3.0, 50)
    tally = perplexity.Tally.of(values[:20]) + perplexity.Tally.of(values[20:])
    assert tally.count == 50
    np.testing.assert_allclose(tally.perplexity, np.exp(values.mean()))
    np.testing.assert_allclose(tally.standard_error, values.std(ddof=1) / np.sqrt(50))
    assert np.isnan(perplexity.Tally().perplexity)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: policies.make_policy("streaming"), "'streaming' is unknown; known: dense"),
        (lambda: policies.make_policy("sinks", cache_size=4, sinks=4), "no room next to sinks=4"),
        (
            lambda: policies.make_policy("evict_for_space", cache_size=13, sinks=3, block=10),
            "block=10: .* below the 10 recent tokens",
        ),
        (lambda: nll(policies.Recompute(4), TOKENS[:1]), "1 tokens predicts nothing"),
        (lambda: nll(policies.Recompute(4), np.array([1, 99])), "token 99"),
    ],
)
def test_what_cannot_be_scored_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
