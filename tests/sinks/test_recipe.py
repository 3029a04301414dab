"""Every variant trains on the same predictions, and what is special to it receives a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.optim import OptimSpec, adamw
from sinks import stream
from sinks.cache import CacheSpec
from sinks.recipe import SINK_TOKENS, decays, variant
from tests.sinks import small

MODEL = small.config(
    family="neox",
    kv_heads=4,
    attention_bias=True,
    mlp_bias=True,
    rope_fraction=0.5,
    activation="gelu",
    parallel_residual=True,
    tie_embeddings=False,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 9)))


def recipe(name, **changes):
    tx = adamw(OptimSpec(lr=0.01, start_lr=0.01, clip=1.0), 10, decays)
    return variant(name, MODEL, tx=tx, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vanilla", "zero", "tokens2"])
def test_a_sample_is_scored_after_its_sink_tokens(name):
    """The loss is that of the stream which begins with the sink tokens, over tokens 2 to T."""
    r = recipe(name)
    assert r.model.vocab_size == 17 + SINK_TOKENS[name] and r.front == tuple(
        range(17, r.model.vocab_size)
    )
    params = r.init(jax.random.key(0))
    loss, metrics = jax.jit(r.loss)(params, {}, {"tokens": TOKENS}, None)
    assert metrics["loss"].weight == 2 * 8

    @jax.jit
    def logp(params, ids):
        x = stream.hidden_from_start(r.model, params, CacheSpec(0, ids.shape[1]), ids)
        return jax.nn.log_softmax(stream.unembed(r.model, params, x))

    ids = np.stack([[*r.front, *row] for row in np.asarray(TOKENS)])
    got = np.asarray(logp(params, ids))[:, len(r.front) :]
    want = -np.mean([got[b, t, TOKENS[b, t + 1]] for b in range(2) for t in range(8)])
    assert float(loss) == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name, where", [("token", "embed"), ("logit", "sink_logit")])
def test_the_sink_is_trained(name, where):
    r = recipe(name)
    params = r.init(jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda p: r.loss(p, {}, {"tokens": TOKENS}, None)[0]))(params)
    sink = gradient["embed"][17] if where == "embed" else gradient["blocks"][where]
    assert np.abs(sink).max() > 1e-6


def test_kernels_decay_and_vectors_do_not():
    params = recipe("logit").init(jax.random.key(0))
    mask = decays(params)
    kept = {k for k, v in (mask | mask.pop("blocks")).items() if not v}
    assert kept == {
        "norm", "norm_bias", "attn_norm", "attn_norm_bias", "mlp_norm", "mlp_norm_bias",
        "q_bias", "k_bias", "v_bias", "o_bias", "up_bias", "down_bias", "sink_logit",
    }  # fmt: skip


@pytest.mark.slow
def test_bfloat16_products_leave_parameters_and_loss_in_float32():
    r = recipe("vanilla", compute="bfloat16")
    params = r.init(jax.random.key(0))
    loss, _ = jax.jit(r.loss)(params, {}, {"tokens": TOKENS}, None)
    exact, _ = jax.jit(recipe("vanilla").loss)(params, {}, {"tokens": TOKENS}, None)
    assert loss.dtype == jnp.float32 and 0 < abs(float(loss - exact)) < 0.05
    with pytest.raises(ValueError, match="compute='float16': float32 or bfloat16"):
        recipe("vanilla", compute="float16")
    with pytest.raises(ValueError, match="variant 'none': known are vanilla, zero"):
        recipe("none")
