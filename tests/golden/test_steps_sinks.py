"""A chunk, decoding past eviction and a training step compute what they always did (tests/golden/steps.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.optim import OptimSpec, adamw
from common.state import init_state
from common.train_step import make_train_step
from sinks import cache, policies, stream
from sinks.cache import CacheSpec
from sinks.recipe import decays, variant
from sinks.sampling import Sampling
from tests.golden.steps import check
from tests.sinks import small

RECORD = Path(__file__).with_name("sinks.json")
CONFIG = small.config(width=16, head_dim=8, mlp_dim=24)
WEIGHTS = {
    "float32": (jnp.float32, False, CacheSpec(2, 6)),
    "bfloat16": (jnp.bfloat16, False, CacheSpec(2, 6, dtype="bfloat16")),
    "int8": (jnp.float32, True, CacheSpec(2, 6, int8=True)),
}
PROMPT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 16)).astype(np.int32)
COUNTS = np.array([16, 11], np.int32)  # of each row's tokens


def size(tree):
    """The norm of every array: on the host, so that nothing more is compiled."""
    return [np.linalg.norm(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: small.params(CONFIG, stacked=True))()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_chunk_and_tokens_past_eviction(weights, params):
    """Two rows of 16 and 11 tokens through a cache of 8, then tokens one by one: as extend and as decode_step do it."""
    dtype, int8, spec = WEIGHTS[weights]
    p = stream.prepare(jax.tree.map(lambda x: x.astype(dtype), params), int8=int8)
    assert isinstance(p["blocks"], tuple), "as on a CPU"
    state = cache.init(CONFIG, spec, 2)
    rounded = weights != "float32"

    step = stream.chunk_step.lower(CONFIG, p, state, PROMPT, COUNTS).compile()
    logits_BV, state = step(p, state, PROMPT, COUNTS)
    check(RECORD, f"{weights} chunk", step, [logits_BV, size(state)], rounded)

    given = (CONFIG, p, state, PROMPT[:, 0], jax.random.key(0), Sampling())
    draw = stream._sample_next.lower(*given).compile()
    write = stream._write.lower(state, draw(*given[1:5])[1]).compile()
    seen = []
    for i in range(4):
        token_B, kept = draw(p, state, PROMPT[:, i], given[4])
        seen.append([size(kept), *([] if rounded else [token_B])])
        state = write(state, kept)
    check(RECORD, f"{weights} token", draw, seen, rounded)
    check(RECORD, f"{weights} write", write, size(state), rounded)


def test_a_scored_chunk_of_stacked_blocks(params):
    policy = policies.Cached(CacheSpec(2, 6))
    given = (params, policy.init(CONFIG), PROMPT[0], PROMPT[1], jnp.int32(13), jax.random.key(0))
    step = policies.score_chunk.lower(CONFIG, policy, *given).compile()
    nll_T, scored_T, state = step(*given)
    check(RECORD, "float32 scored", step, [nll_T, scored_T, size(state)], False)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_two_training_steps(compute):
    tx = adamw(OptimSpec(lr=0.01, start_lr=0.01, clip=1.0), 10, decays)
    recipe = variant("logit", small.config(), tx=tx, compute=compute)
    state = jax.jit(lambda: init_state(recipe, jax.random.key(0)))()
    batch = {"tokens": PROMPT}
    step = jax.jit(make_train_step(recipe)).lower(state, batch, jnp.int32(0)).compile()
    seen = []
    for i in range(2):
        state, metrics = step(state, batch, jnp.int32(i))
        seen.append({name: m.sum / m.weight for name, m in metrics.items()})
    moments = size(state.opt_state)
    check(
        RECORD,
        f"{compute} training",
        step,
        [seen, size(state.params), moments],
        compute != "float32",
    )
