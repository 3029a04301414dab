"""What XLA's CPU compiler is told (metaopt/ops.py) stands in the way of no transformation of jax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
from metaopt.ops import kept, sum_all
from tests.metaopt.small import few, float64, learned, plain

MODES = ["closed", "tangent", "replay"]


def trained(tx):
    """A function of the first weights: (the trained weights, the learned rate)."""
    _, batches, loss = few(jnp.float64)

    def step(now, batch):
        params, state = now
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    def train(w):
        # No array without a gradient: optax's own root of zero has no derivative.
        params = {"w": w, "dead": jnp.zeros((0,))}
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.stack(batches[:4]))
        return params["w"], state.values["learning_rate"]

    return train


def learned_adam(mode):
    return plain(
        optax.adam, mode=mode, by=optax.sgd(10.0), **learned({"learning_rate": 0.01, "b2": 0.99})
    )


@pytest.mark.parametrize("mode", MODES)
def test_forward_mode_goes_through_whole_updates(mode):
    """The derivative of four updates by the first weights is their finite difference."""
    with float64():
        train = jax.jit(trained(learned_adam(mode)))
        w, dw = np.random.default_rng(0).standard_normal((2, 5, 2))
        with jax.numpy_dtype_promotion("standard"):  # jax's own derivative of b1**count needs it
            _, tangents = jax.jit(lambda w: jax.jvp(train, (w,), (jnp.asarray(dw),)))(w)
        h = 1e-6
        for tangent, up, down in zip(tangents, train(w + h * dw), train(w - h * dw)):
            np.testing.assert_allclose(tangent, (up - down) / (2 * h), rtol=1e-5, atol=1e-8)
        assert abs(tangents[1]) > 1e-4, "the rate depends on the weights"


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_vmap_over_seeds_is_each_seed_alone(mode):
    with float64():
        train = trained(metaopt.auto(optax.adamw) if mode == "auto" else learned_adam(mode))
        seeds = np.random.default_rng(0).standard_normal((3, 5, 2))
        together = jax.jit(jax.vmap(train))(seeds)
        alone = jax.lax.map(train, seeds)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), together, alone)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 7), (3, 0)])
def test_a_sum_is_the_sum(shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    np.testing.assert_allclose(sum_all(x), jnp.sum(x), rtol=1e-6, atol=1e-6)
    value, tangent = jax.jvp(sum_all, (x,), (2 * x,))
    np.testing.assert_allclose([value, tangent], [sum_all(x), 2 * sum_all(x)], rtol=1e-6)
    assert kept({"x": x})["x"].shape == shape
