"""Signals that were wrong without a word: large decay, schedules, complex numbers, arguments of the update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
from metaopt import Guards, Rollback, hyper, learn
from metaopt.rule import row
from tests.metaopt.small import alone, float64, learned, plain

A = np.random.default_rng(0).standard_normal(
    (2, 3, 6, 3)
)  # real and imaginary parts of three batches
STEPS = 2


def real_loss(p, i):
    return jnp.mean(jnp.square(jnp.tanh(A[0, i] @ p["w"]) - 0.3))


def judge(factory, mode, specs, loss=real_loss, loss_as_value=False, **constants):
    """A jitted function of raw values to (signals, finite differences of plain optax's last update, the state)."""
    tx = plain(factory, mode=mode, by=optax.sgd(0.0), **specs, **constants)
    resolved = {k: s.resolved(k) for k, s in specs.items()}

    def extra(p, i):
        return {"value": loss(p, i)} if loss_as_value else {}

    def gradient(p, i):  # what optax takes: of complex parameters, the conjugate
        return jax.tree.map(jnp.conj, jax.grad(loss)(p, i))

    @jax.jit
    def run(params, raw):
        state = tx.init(params)._replace(raws=row(raw))
        for i in range(STEPS):
            grads, before, base = gradient(params, i), params, state.base
            updates, state = tx.update(grads, state, params, **extra(params, i))
            params = optax.apply_updates(params, updates)
        _, judged = tx.update(gradient(params, STEPS), state, params, **extra(params, STEPS))

        def after(h):
            natural = {k: resolved[k].value(raw[k] + h[k], jnp.int32(STEPS - 1)) for k in raw}
            rule = alone(factory(**natural, **constants))
            updates, _ = rule.update(grads, base, before, **extra(before, STEPS - 1))
            return loss(optax.apply_updates(before, updates), STEPS)

        zero, h = dict.fromkeys(raw, 0.0), 1e-5
        slopes = {k: (after(zero | {k: h}) - after(zero | {k: -h})) / (2 * h) for k in raw}
        return judged.signals, slopes, judged

    return run


def start(specs):
    return {k: jnp.asarray(s.resolved(k).raw(s.init)) for k, s in specs.items()}


PARAMS = {"w": np.array([0.4, -0.7, 0.2])}


@pytest.mark.parametrize("what, modes", [
    ("both", ["closed"]),
    pytest.param("both", ["tangent", "replay"], marks=pytest.mark.slow),
    pytest.param("weight_decay", ["closed"], marks=pytest.mark.slow),
])  # fmt: skip
def test_large_decay_is_differentiated_as_it_is_done(what, modes):
    """AdamW's closed form solves for the last weights, of which rate x decay = 1 leaves nothing."""
    values = {"learning_rate": 0.5, "weight_decay": 1.0}
    constants = {} if what == "both" else {"learning_rate": values.pop("learning_rate")}
    with float64():
        specs = learned(values)
        runs = {mode: judge(optax.adamw, mode, specs, **constants) for mode in modes}
        for product in (0.3, 0.5, 0.9, 1.0, 1.5, 3.0):
            raw = start(specs) | {"weight_decay": jnp.log(product / 0.5)}
            for mode, run in runs.items():
                signals, slopes, _ = run(PARAMS, raw)
                for name in values:
                    # On 1 itself the closed form moves the rate by 1.5e-8 of it.
                    want = pytest.approx(float(slopes[name]), rel=2e-6, abs=1e-9)
                    assert float(signals[name]) == want, (product, mode, name)


def test_near_one_the_update_takes_the_rate_that_is_shown():
    """Where the closed form needs room, the update makes it; the raw rate moves on, so that it can pass."""
    for dtype, room in ((jnp.float32, 5e-4), (jnp.bfloat16, 0.1)):
        params = {"w": jnp.linspace(1.0, 2.0, 4, dtype=dtype)}
        tx = plain(optax.adamw, learning_rate=learn(10.0), weight_decay=0.1)
        updates, state = jax.jit(tx.update)(params, tx.init(params), params)
        rate = float(state.values["learning_rate"])
        assert 0 < abs(rate / 10 - 1) < room
        by_hand = -rate * (
            1 + 0.1 * np.asarray(params["w"], np.float32)
        )  # Adam's first direction is the sign
        np.testing.assert_allclose(np.asarray(updates["w"], np.float32), by_hand, rtol=1e-2)
        assert float(state.raw["learning_rate"]) == pytest.approx(np.log(10.0), rel=1e-6)


@pytest.mark.parametrize("mode", ["closed", "replay"])
def test_the_last_update_is_judged_at_its_own_time(mode):
    """With a schedule, by the value that the schedule had then, not by the present one."""
    specs = {"learning_rate": learn(0.1, schedule=lambda count: 1.0 / (1.0 + count))}
    with float64():
        signals, slopes, _ = judge(optax.sgd, mode, specs)(PARAMS, start(specs))
        assert float(signals["learning_rate"]) == pytest.approx(
            float(slopes["learning_rate"]), rel=1e-6
        )


def complex_loss(p, i):
    z = (A[0, i] + 1j * A[1, i]) @ p["z"]
    return jnp.mean(jnp.abs(z - 1) ** 2) + jnp.sum(
        jnp.abs(p["z"] * p["r"].astype(p["z"].dtype) + 1j) ** 2
    )


RULES = [
    (optax.adamw, {"b2": 0.9, "weight_decay": 0.1}),
    (optax.sgd, {"momentum": 0.9}),
    (optax.rmsprop, {"decay": 0.9}),
]


@pytest.mark.parametrize("factory, more, mode", [
    (*RULES[0], "closed"),
    *(pytest.param(*rule, mode, marks=pytest.mark.slow) for rule in RULES for mode in ("closed", "tangent", "replay")),
])  # fmt: skip
def test_complex_parameters_have_real_hyperparameters(factory, more, mode):
    """Signals are Re(conj(g) u): slopes of the next loss."""
    specs = learned({"learning_rate": 0.01, **more})
    with float64():
        params = {"z": np.array([0.3 + 1j, -0.2j, 0.5]), "r": np.array([0.5, -1.0, 2.0])}
        run = judge(factory, mode, specs, complex_loss)
        signals, slopes, state = run(params, start(specs))
        for name in specs:
            assert state.values[name].dtype == jnp.float64
            want = pytest.approx(float(slopes[name]), rel=1e-5, abs=1e-9)
            assert float(signals[name]) == want, name


@pytest.mark.slow
def test_guards_and_traces_take_complex_parameters():
    params = {"z": jnp.array([1 + 2j, 0.5j], jnp.complex64)}
    tx = metaopt.auto(optax.adam, guards=Guards(rollback=Rollback()))
    state, update = tx.init(params), jax.jit(tx.update)
    first, before = params, jax.tree.map(jnp.result_type, state)
    for _ in range(40):
        updates, state = update(params, state, params, value=0.0)
        params = optax.apply_updates(params, updates)
    assert jax.tree.map(jnp.result_type, state) == before
    assert state.values["learning_rate"].dtype == jnp.float32
    assert np.all(np.abs(params["z"]) < np.abs(first["z"]))


@pytest.mark.parametrize("factory, values", [
    pytest.param(
        optax.contrib.momo_adam, {"learning_rate": 0.01, "b1": 0.9, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1},
        marks=pytest.mark.slow,
    ),
    (optax.polyak_sgd, {"max_learning_rate": 50.0, "scaling": 0.3, "f_min": 0.001}),
])  # fmt: skip
def test_the_loss_of_the_last_update_is_replayed(factory, values):
    specs = learned(values)
    with float64():
        run = judge(factory, "replay", specs, loss_as_value=True)
        signals, slopes, _ = run(PARAMS, start(specs))
        for k in values:
            assert float(signals[k]) == pytest.approx(float(slopes[k]), rel=1e-4, abs=1e-10), k
        assert any(abs(float(s)) > 1e-6 for s in signals.values())


def test_an_argument_that_cannot_be_kept_is_refused_by_replay_alone():
    """Sophia's objective closes over the batch. "auto" takes tangents; arguments that nothing reads do no harm."""
    specs = learned(
        {"learning_rate": 0.1, "b1": 0.9, "eps": 1e-4, "gamma": 0.1, "weight_decay": 0.1}
    )
    params = {"w": jnp.array([1.0, 2.0])}
    make = lambda factory, mode: hyper(factory, by=optax.sgd(0.1), mode=mode, **specs)  # noqa: E731

    def update(tx):
        abstract = jax.eval_shape(tx.init, params)
        objective = lambda p: jnp.sum(p["w"] ** 2)  # noqa: E731
        more = dict(obj_fn=objective, key=jnp.ones(2), flag=True)
        jax.eval_shape(lambda p, s: tx.update(p, s, p, **more), params, abstract)
        return metaopt.describe(abstract)

    assert "tangent signal" in update(make(optax.contrib.sophia, "auto"))
    with pytest.raises(ValueError, match=r"reads the argument 'obj_fn'.*mode=\"tangent\""):
        update(make(optax.contrib.sophia, "replay"))
    harmless = hyper(optax.lion, by=optax.sgd(0.1), mode="replay", learning_rate=learn(0.1))
    assert "replay signal" in update(harmless)
