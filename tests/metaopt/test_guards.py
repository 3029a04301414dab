"""What keeps training alive: non-finite gradients, rates far too high or too low, loss spikes, bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metaopt
from metaopt import Guards, Rollback, Trace, hyper, learn
from tests.metaopt.small import alone, model, run

BOUNDS = (1e-3, 0.9)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("mode", ["closed", "tangent", "replay"])
def test_steps_without_finite_gradients_change_nothing(mode, bad):
    """A run with bad steps in between ends where the run without them ends, bit for bit."""
    tx = hyper(
        optax.adamw, learning_rate=learn(0.01), b2=learn(0.99), weight_decay=learn(0.1),
        by=optax.sgd(0.05), mode=mode,
    )  # fmt: skip
    params, batches, loss = model()
    update = jax.jit(tx.update)

    def train(spoil):
        p, state = params, tx.init(params)
        for i, batch in enumerate(batches[:5]):
            grads = jax.grad(loss)(p, batch)
            if spoil and i in (0, 3):
                wrong = {**grads, "w2": grads["w2"].at[1, 1].set(bad)}
                updates, state = update(wrong, state, p)
                p = optax.apply_updates(p, updates)
            updates, state = update(grads, state, p)
            p = optax.apply_updates(p, updates)
        return p, state

    same(train(False), train(True))


@pytest.mark.parametrize("trace", [Trace(), Trace(power=1.0)])
def test_a_signal_that_does_not_exist_stops_nothing(trace):
    """The clipping norm has no derivative at zero gradients; the run goes on when there are gradients again."""

    def clipped(rate, norm):
        return optax.chain(optax.clip_by_global_norm(norm), optax.sgd(rate))

    tx = hyper(clipped, rate=learn(0.1), norm=learn(0.1), by=optax.sgd(0.1), trace=trace)
    params = {"w": jnp.ones(3)}
    state, update = tx.init(params), jax.jit(tx.update)
    for scale in (1.0, 0.0, 0.0, 1.0, 1.0, 1.0):
        updates, state = update({"w": jnp.full(3, scale)}, state, params)
    assert float(jnp.abs(updates["w"]).min()) > 0
    assert all(np.isfinite(v) for v in metaopt.learned(state).values())
    assert float(state.values["rate"]) != pytest.approx(0.1)


@functools.cache
def unruly(form: str):
    """(init, jitted update) of an optimizer whose hyperparameters jump by hundreds."""
    rate_form = "square" if form == "square" else "log"
    tx = hyper(
        optax.rmsprop,
        learning_rate=learn(0.1, bounds=BOUNDS, bijector=rate_form),
        decay=learn(0.5, bijector=form, bounds=BOUNDS),
        by=optax.sgd(100.0),
        guards=Guards(max_change=0),
    )
    return tx.init, jax.jit(tx.update)


@given(st.integers(0, 10_000), st.sampled_from(["log", "logit", "square", "half_logit"]))
@settings(max_examples=20, deadline=None)
def test_learned_values_never_leave_their_bounds(seed, form):
    """However wild the gradients: rates stay positive and decays in (0, 1), in float32."""
    init, update = unruly(form)
    rng = np.random.default_rng(seed)
    params = {"w": jnp.ones(3)}
    state = init(params)
    for _ in range(5):
        wild = rng.standard_normal(3) * 10.0 ** rng.integers(-8, 8)
        _, state = update({"w": jnp.asarray(wild, jnp.float32)}, state, params)
        for value in state.values.values():
            assert BOUNDS[0] * (1 - 1e-4) <= float(value) <= BOUNDS[1] * (1 + 1e-4)


@pytest.mark.slow
def test_largest_change_and_normalisation():
    """Signals that agree move the log rate by exactly the upper rate, or by max_change if that is less."""

    def rates(**guards):
        tx = hyper(optax.sgd, learning_rate=learn(0.01), by=optax.sgd(0.5), guards=Guards(**guards))
        params, batches, loss = model()
        state, logs = tx.init(params), []
        for batch in batches[:4]:
            # A loss of any unit: signals are normalised.
            grads = jax.tree.map(lambda g: 1e-3 * g, jax.grad(loss)(params, batch))
            _, state = tx.update(grads, state, params)
            logs.append(float(state.raw["learning_rate"]))
        return np.diff(logs)

    # Constant gradients: the signal agrees, so each step has the full length.
    first, second, _ = rates(max_change=0.0)
    assert first == 0  # one signal has no scale yet
    assert second == pytest.approx(0.5, rel=1e-4)
    assert np.abs(rates(max_change=0.1)).max() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("factory", [optax.sgd, optax.adamw])
@pytest.mark.parametrize("rate", [1e-8, 1e-3, 1e4])
def test_auto_works_from_any_rate(factory, rate):
    """From 1e8 times too low to 1e4 too high, with no hyper-learning-rate."""
    tx = metaopt.auto(factory, learning_rate=rate)
    params, batches, loss = model()

    @jax.jit
    def train(params, state):
        def step(carry, i):
            params, state = carry
            batch = jax.tree.map(lambda *b: jnp.stack(b)[i % 40], *batches)
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), state.values["learning_rate"]

        return jax.lax.scan(step, (params, state), jnp.arange(500))

    (params, state), rates = train(params, tx.init(params))
    final = np.mean([float(loss(params, b)) for b in batches])
    assert np.isfinite(rates).all() and float(rates.min()) > 0
    assert final < 0.05
    assert 1e-3 < float(rates.max()) < 1e2


def test_rollback_saves_a_rate_that_explodes():
    """1e4 times too high with nothing but rollback: back to the snapshot, at a tenth of the rate, until it goes down."""
    guards = Guards(rollback=Rollback(), max_change=0.05)
    tx = hyper(optax.sgd, learning_rate=learn(3e3), by=optax.sgd(0.05), guards=guards)
    _, state, losses = run(tx, 40, value=True)
    assert np.isfinite(losses[-1]) and losses[-1] < losses[0]
    assert 1e-3 < float(state.values["learning_rate"]) < 30
    bare = hyper(
        optax.sgd, learning_rate=learn(3e3), by=optax.sgd(0.05), guards=Guards(max_change=0.05)
    )
    assert not run(bare, 40)[2][-1] < losses[0]  # without it, the run is lost


@pytest.mark.slow
def test_rollback_returns_to_the_snapshot_itself():
    params, batches, loss = model()
    tx = hyper(
        optax.adam, learning_rate=learn(1e-3), by=optax.sgd(0.0), guards=Guards(rollback=Rollback())
    )
    state, start = tx.init(params), params
    for value in (1.0, 0.9, 0.8, np.nan):
        before = float(state.values["learning_rate"])
        updates, state = tx.update(jax.grad(loss)(params, batches[0]), state, params, value=value)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, start)
    assert float(state.values["learning_rate"]) == pytest.approx(before / 10, rel=1e-5)
    same(state.base, tx.init(params).base)
    with pytest.raises(ValueError, match=r"value=loss"):
        tx.update(params, state, params)


def test_a_falling_loss_is_no_spike():
    tx = hyper(
        optax.adam, learning_rate=learn(1e-2), by=optax.sgd(0.0), guards=Guards(rollback=Rollback())
    )
    ours = run(tx, 30, value=True)[0]
    theirs = run(alone(optax.adam(1e-2)), 30)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["closed", "tangent", "replay"])
def test_a_shortened_update_has_the_signal_of_its_shorter_rate(mode):
    """The rate that max_move leaves is the one a run would have had from the start."""

    def after(rate, move):
        tx = hyper(
            optax.adam,
            learning_rate=learn(rate),
            by=optax.sgd(0.0),
            mode=mode,
            guards=Guards(max_move=move),
        )
        params, state, _ = run(tx, 2)
        return params, state

    params, state = after(1e3, 0.01)
    assert float(state.values["learning_rate"]) < 0.1
    # A run that starts at the rate the first update was cut to.
    first = run(
        hyper(
            optax.adam,
            learning_rate=learn(1e3),
            by=optax.sgd(0.0),
            mode=mode,
            guards=Guards(max_move=0.01),
        ),
        1,
    )[1]
    again, want = after(float(first.values["learning_rate"]), 0.01)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), params, again)
    np.testing.assert_allclose(
        state.signals["learning_rate"], want.signals["learning_rate"], rtol=1e-3
    )


def test_the_largest_move_grows_until_it_settles():
    tx = hyper(
        optax.sgd,
        learning_rate=learn(1e6),
        by=optax.sgd(0.0),
        guards=Guards(max_move=0.1, settle=4),
    )
    params = {"w": jnp.full(9, 2.0)}
    state = tx.init(params)
    for i, part in enumerate((0.25, 0.5, 0.75, 1.0, 1.0)):
        # Each gradient is a hundred times the last one, so that the bound decides whatever the rate was cut to before.
        grads = {"w": jnp.full(9, 100.0**i)}
        updates, state = jax.jit(tx.update)(grads, state, params)
        length = np.linalg.norm(updates["w"]) / np.linalg.norm(params["w"])
        np.testing.assert_allclose(length, 0.1 * part, rtol=1e-4)
        rate = float(state.values["learning_rate"])
        np.testing.assert_allclose(rate * 100.0**i, 0.1 * part * 2.0, rtol=1e-4)  # cut along


def test_parameters_that_start_at_zero_do_move():
    tx = metaopt.auto(optax.adam, trace=Trace(power=1.0))
    params = {"w": jnp.zeros(4)}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update({"w": 2 * (params["w"] - 1.0)}, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(300):
        params, state = step(params, state)
    assert float(jnp.abs(params["w"] - 1).max()) < 0.2
