"""Three steps of I-JEPA pretraining compute what they always did (tests/golden/steps.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.nn.ops import Policy
from common.schedules import linear
from common.state import init_state
from common.train_step import make_train_step
from jepa.masks import MaskSpec
from jepa.objective import ObjectiveSpec
from jepa.recipe import AddMasks, IJepa
from tests.golden.steps import check
from tests.jepa.small import CONFIG

RECORD = Path(__file__).with_name("jepa.json")
BATCH, STEPS = 8, 3
OBJECTIVES = {
    "plain": ObjectiveSpec(),
    "all": ObjectiveSpec(distance="l2", center=True, vicreg=0.01, position_noise=0.25),
}


# Each form and each precision, with either objective; tests/common/test_ops.py holds the forms against each other.
@pytest.mark.parametrize(
    ("form", "compute", "mode", "objective"),
    [
        ("cpu", "bfloat16", "fixed", "plain"),
        ("plain", "float32", "fixed", "plain"),
        ("cpu", "float32", "paper", "all"),
        ("plain", "bfloat16", "paper", "all"),
    ],
)
def test_three_steps(form, compute, mode, objective):
    masks = MaskSpec(CONFIG.grid, mode=mode, min_keep=2, collate=4)
    policy = Policy(compute=compute, unroll=1, form=form, at_once=4)
    recipe = IJepa(
        CONFIG, masks, optax.adamw(1e-3), linear(0.9, 1.0, STEPS), OBJECTIVES[objective], policy
    )
    state = jax.jit(lambda key: init_state(recipe, key))(jax.random.key(0))
    rng = np.random.default_rng(0)
    batches = []
    for step in range(STEPS):
        image = rng.integers(0, 256, (BATCH, *CONFIG.image, 3), dtype=np.uint8)
        batches.append(AddMasks(masks, seed=0)({"image": image}, step * BATCH + np.arange(BATCH)))
    step = jax.jit(make_train_step(recipe)).lower(state, batches[0], jnp.int32(0)).compile()
    seen = []
    for i, batch in enumerate(batches):
        state, metrics = step(state, batch, jnp.int32(i))
        norms = {"params": optax.tree.norm(state.params), "target": optax.tree.norm(state.extra)}
        seen.append({name: m.sum / m.weight for name, m in metrics.items()} | norms)
    moments = jax.tree.map(lambda m: jnp.sqrt((m**2).sum()), state.opt_state[0].mu)
    check(
        RECORD,
        f"{compute} {mode} {objective}",
        step,
        [seen, moments],
        rounded=compute == "bfloat16",
    )
