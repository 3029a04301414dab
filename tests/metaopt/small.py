"""A small model in float64 or any other type, and optimizers to learn."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metaopt
from metaopt import Guards, learn
from metaopt.learn import lenient

SGD = optax.sgd(0.01)


@contextlib.contextmanager
def float64():
    """jax in double precision."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def model(dtype=jnp.float32, seed: int = 0):
    """(params, batches, loss): a tanh network and what a teacher says; one array is dead (its gradient is always zero)."""
    rng = np.random.default_rng(seed)
    params = {
        "w1": jnp.asarray(rng.standard_normal((5, 4)) / 2, dtype),
        "w2": jnp.asarray(rng.standard_normal((4, 2)) / 2, dtype),
        "dead": jnp.asarray(rng.standard_normal(3), dtype),
    }
    x = jnp.asarray(rng.standard_normal((40, 8, 5)), dtype)
    y = jnp.tanh(x @ jnp.asarray(rng.standard_normal((5, 2)), dtype))

    def loss(params, batch):
        x, y = batch
        out = jnp.tanh(x @ params["w1"]) @ params["w2"]
        return jnp.mean(jnp.square(out - y)) + 0 * jnp.sum(params["dead"])

    return params, [(x[i], y[i]) for i in range(40)], loss


def few(dtype=jnp.float32, seed: int = 0):
    """The same with two arrays, which compiles sooner."""
    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(rng.standard_normal((5, 2)) / 2, dtype), "dead": jnp.ones(2, dtype)}
    x = jnp.asarray(rng.standard_normal((10, 8, 5)), dtype)

    def loss(params, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ params["w"]) - 0.3)) + 0 * jnp.sum(params["dead"])

    return params, list(x), loss


def run(tx, steps: int, dtype=jnp.float32, value: bool = False, seed: int = 0):
    """Trains; returns (params, optimizer state, losses)."""
    params, batches, loss = model(dtype, seed)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        now, grads = jax.value_and_grad(loss)(params, batch)
        extra = {"value": now} if value else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, now

    losses = []
    for batch in batches[:steps]:
        params, state, now = step(params, state, batch)
        losses.append(float(now))
    return params, state, losses


def alone(tx):
    """An optimizer of optax without metaopt: most need jax's standard promotion of types."""
    update = optax.with_extra_args_support(tx).update
    return optax.GradientTransformationExtraArgs(tx.init, lenient(update))


def plain(factory, by=SGD, mode="auto", **kwargs):
    """A level without guards, so that its signals can be compared."""
    return metaopt.hyper(
        factory, by=by, mode=mode, guards=Guards(normalize=False, max_change=0), **kwargs
    )


# Factory -> (what can be learned, constants): every rule with a closed form, and some without.
CASES = {
    "sgd": (optax.sgd, {"learning_rate": 0.1}, {}),
    "momentum": (optax.sgd, {"learning_rate": 0.1, "momentum": 0.9}, {}),
    "heavy_ball": (optax.sgd, {"learning_rate": 0.1}, {"momentum": 0.8}),
    "nesterov": (optax.sgd, {"learning_rate": 0.1, "momentum": 0.9}, {"nesterov": True}),
    "adam": (optax.adam, {"learning_rate": 0.01, "b1": 0.9, "b2": 0.99, "eps": 1e-3}, {"eps_root": 1e-10}),
    "adam_rate": (optax.adam, {"learning_rate": 0.01}, {}),
    "adamw": (
        optax.adamw,
        {"learning_rate": 0.01, "b1": 0.9, "b2": 0.99, "eps": 1e-3, "weight_decay": 0.1},
        {"mask": lambda params: {**dict.fromkeys(params, True), "dead": False}},
    ),
    "adamw_rate": (optax.adamw, {"learning_rate": 0.01}, {"weight_decay": 0.3}),
    "rmsprop": (optax.rmsprop, {"learning_rate": 0.01, "decay": 0.9, "eps": 1e-4}, {}),
    "adagrad": (optax.adagrad, {"learning_rate": 0.1, "eps": 1e-4}, {}),
    "lion": (optax.lion, {"learning_rate": 0.01, "weight_decay": 0.1}, {}),
    "lamb": (optax.lamb, {"learning_rate": 0.01, "b1": 0.9}, {"weight_decay": 0.01}),
    "nadam": (optax.nadam, {"learning_rate": 0.01, "b1": 0.9, "b2": 0.99}, {}),
    "adabelief": (optax.adabelief, {"learning_rate": 0.01, "b2": 0.99}, {}),
}  # fmt: skip


def learned(values, **options):
    return {name: learn(value, **options) for name, value in values.items()}
