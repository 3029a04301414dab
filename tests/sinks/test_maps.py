"""Attention maps are those of the stream itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinks import maps, stream
from sinks.cache import CacheSpec
from tests.sinks import small

CASES = {
    "sinks": (small.config(), CacheSpec(sinks=2, recent=5)),
    "partial rope": (small.config(head_dim=8, rope_fraction=0.5), CacheSpec(sinks=3, recent=4)),
    "alibi": (small.config(alibi=True, rope_theta=0), CacheSpec(sinks=2, recent=5)),
    "zero sink, window": (small.config(sink_logits="zero"), CacheSpec(sinks=0, recent=5)),
    "learned sink": (small.config(sink_logits="learned"), CacheSpec(sinks=1, recent=20)),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (3, 20)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_what_the_model_computes_with(case):
    """Mixed by them, values give the stream's own output; and each query's visible set is the spec's."""
    config, spec = CASES[case]
    params = small.params(config)
    x, weight = jax.jit(maps._run, static_argnums=(0, 2))(config, params, spec, TOKENS)
    want = jax.jit(stream.hidden_from_start, static_argnums=(0, 2))(config, params, spec, TOKENS)
    np.testing.assert_allclose(x, want, atol=2e-5 * np.abs(want).max())
    for t in range(20):
        seen = {j for j in range(t + 1) if j < spec.sinks or t - j <= spec.recent}
        assert {int(j) for j in np.flatnonzero(weight[:, :, t].sum((0, 1)))} == seen
    rest = 1 - np.asarray(weight).sum(-1)
    assert (rest > -1e-5).all() and (rest > 1e-3).any() == (config.sink_logits != "none")


def test_the_share_counts_the_first_tokens_and_no_token():
    weight = np.zeros((1, 2, 4, 4))
    weight[0, 0, 2:, 0], weight[0, 0, 2:, 1] = 0.5, 0.25
    weight[0, 1, 2:, 3] = 1
    got = maps.Maps(jnp.asarray(weight), jnp.asarray(1 - weight.sum(-1)))
    np.testing.assert_allclose(maps.sink_share(got, 1, 2), [[0.75, 0.0]])
    np.testing.assert_allclose(maps.sink_share(got, 2, 2), [[1.0, 0.0]])
    with pytest.raises(
        ValueError, match="first=4: must be at least sinks=1 and below the 4 tokens"
    ):
        maps.sink_share(got, 1, 4)
