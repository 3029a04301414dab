"""Eight steps with learned hyperparameters compute what they always did (tests/golden/steps.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import metaopt
from metaopt import hyper, learn
from tests.golden.steps import check
from tests.metaopt.small import few

RECORD = Path(__file__).with_name("metaopt.json")
STEPS = 8


def adam(mode):
    return hyper(
        optax.adam, learning_rate=learn(0.01), b2=learn(0.99), by=optax.sgd(0.1), mode=mode
    )


def tower():
    tx = optax.sgd(0.1)
    for rate in (0.1, 0.1, 0.01):
        tx = hyper(optax.adam, learning_rate=learn(rate), by=tx)
    return tx


CASES = {
    "closed": lambda: adam("closed"),
    "tangent": lambda: adam("tangent"),
    "replay": lambda: adam("replay"),
    "tower": tower,
    "auto": lambda: metaopt.auto(optax.adamw),
    "bfloat16": lambda: hyper(
        optax.adamw, learning_rate=learn(0.01), weight_decay=0.1, by=optax.sgd(0.1)
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_eight_steps(case):
    tx = CASES[case]()
    params, batches, loss = few(jnp.bfloat16 if case == "bfloat16" else jnp.float32)
    state = tx.init(params)

    def train_step(params, state, batch):
        now, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, value=now)
        return optax.apply_updates(params, updates), state, {"loss": now}

    step = jax.jit(train_step).lower(params, state, batches[0]).compile()
    seen = []
    for batch in batches[:STEPS]:
        params, state, metrics = step(params, state, batch)
        seen.append(metrics | metaopt.learned(state))
    history = jax.tree.map(lambda *of_steps: jnp.stack(of_steps), *seen)
    check(RECORD, case, step, {"params": params} | history, rounded=case == "bfloat16")
