"""The jitted step: what microbatches cost."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax

from common.metrics import mean
from common.state import init_state
from common.train_step import make_train_step


def test_microbatches_take_the_memory_of_one():
    def loss(params, extra, batch, key):
        h = batch["x"]
        for _ in range(6):  # each keeps 4 MB for the backward pass
            h = jnp.sin(h * params["w"][None])
        return h.mean(), {"loss": mean(h.mean())}

    recipe = SimpleNamespace(
        init=lambda key: {"w": jnp.ones(4096)},
        init_extra=lambda params: {},
        tx=optax.sgd(0.1),
        loss=loss,
        update_extra=lambda extra, params, step: extra,
        log=lambda opt_state, step: {},
    )
    state = init_state(recipe, jax.random.key(0))
    batch = {"x": jax.ShapeDtypeStruct((256, 4096), jnp.float32)}

    def temporary_bytes(accumulate: int) -> int:
        step = jax.jit(make_train_step(recipe, accumulate))
        return step.lower(state, batch, 0).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < 0.4 * temporary_bytes(1)
