"""Hypergradients: every way to get them gives finite differences of the next loss; the model is differentiated once."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metaopt
from metaopt import Guards, Trace, hyper, learn
from metaopt.rule import row
from tests.metaopt.small import CASES, alone, few, float64, learned, model, plain, run

CLOSED = [name for name in CASES if name not in ("lion", "lamb", "nadam", "adabelief")]
STEPS = 4


@functools.cache
def stepper(case: str, mode: str):
    """(init, jitted train step) of a case without guards; the initial raw values are the caller's to change."""
    factory, values, constants = CASES[case]
    tx = plain(factory, mode=mode, **learned(values), **constants)
    _, _, loss = few(jnp.float64)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    return tx.init, step


def trajectory(case: str, mode: str, shift: dict, seed: int):
    """Signals of a few steps, and what the last update was made of."""
    init, step = stepper(case, mode)
    params, batches, _ = few(jnp.float64, seed)
    state = init(params)
    state = state._replace(raws=row({name: state.raw[name] + shift[name] for name in state.raw}))
    signals = []
    for batch in batches[:STEPS]:
        before = (params, state)
        params, state, grads = step(params, state, batch)
        signals.append(state.signals)
    return signals, before, grads, params, state


shifts = st.floats(-1.0, 1.0, allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_all_ways_agree(case, data):
    shift = {name: data.draw(shifts) for name in CASES[case][1]}
    seed = data.draw(st.integers(0, 5))
    with float64():
        modes = ["tangent", "replay"] + (["closed"] if case in CLOSED else [])
        want = trajectory(case, modes[0], shift, seed)[0]
        for mode in modes[1:]:
            got = trajectory(case, mode, shift, seed)[0]
            for w, g in zip(want, got):
                for name in w:
                    scale = abs(float(w[name])) + 1e-9
                    assert abs(float(g[name] - w[name])) < 1e-8 * scale, (mode, name)


@pytest.mark.parametrize("case", CASES)
def test_signals_are_finite_differences_of_the_next_loss(case):
    """d loss / d raw by moving the last update's hyperparameter and nothing else, with optax's own update."""
    factory, values, constants = CASES[case]
    with float64():
        shift = dict.fromkeys(values, 0.1)
        _, (params, state), grads, _, now = trajectory(case, "auto", shift, 0)
        _, batches, loss = few(jnp.float64)
        specs = {name: learn(v).resolved(name) for name, v in values.items()}

        def loss_after(raw):
            at = {n: specs[n].value(raw[n], now.updates) for n in raw}
            tx = alone(factory(**constants, **at))
            updates, _ = tx.update(grads, state.base, params)
            return loss(optax.apply_updates(params, updates), batches[STEPS])

        init, step = stepper(case, "auto")
        raw_used = now.raw
        used = {n: specs[n].value(raw_used[n], 0) for n in raw_used}
        updates, _ = alone(factory(**constants, **used)).update(grads, state.base, params)
        after = optax.apply_updates(params, updates)
        _, judged, _ = step(after, now, batches[STEPS])
        for name in values:
            h = 1e-5
            up, down = ({**raw_used, name: raw_used[name] + s * h} for s in (1, -1))
            slope = float(loss_after(up) - loss_after(down)) / (2 * h)
            assert float(judged.signals[name]) == pytest.approx(slope, rel=2e-5, abs=1e-11), name


@pytest.mark.parametrize("mode", ["tangent", "replay", "closed"])
def test_one_model_backward_in_the_step(mode):
    """Products in the train step's program: as many with a tower as with plain optax."""
    params, batches, loss = model()

    def products(tx):
        def step(params, state, batch):
            grads = jax.grad(loss)(params, batch)
            return tx.update(grads, state, params)

        text = str(jax.make_jaxpr(step)(params, tx.init(params), batches[0]))
        # Products of matrices: sums are products with a vector of ones.
        return len(re.findall(r"f32\[\d+,\d+\] = dot_general", text)), text.count("tanh")

    tower = hyper(
        optax.adam, learning_rate=learn(1e-2), b2=learn(0.99), mode=mode,
        by=hyper(optax.adam, learning_rate=learn(1e-2), by=optax.sgd(0.1)),
    )  # fmt: skip
    assert products(tower) == products(alone(optax.adam(1e-2)))


@pytest.mark.slow
def test_a_weight_that_never_had_a_gradient_does_not_poison_b2():
    def b2_signals(safe, mode):
        guards = Guards(safe_sqrt=safe, skip_nonfinite=False)
        tx = hyper(
            optax.adam,
            learning_rate=learn(0.01),
            b2=learn(0.99),
            by=optax.sgd(0.01),
            mode=mode,
            guards=guards,
        )
        return run(tx, 3)[1].signals["b2"]

    for mode in ("tangent", "replay"):
        assert math.isfinite(b2_signals(True, mode)) and b2_signals(True, mode) != 0
        assert math.isnan(b2_signals(False, mode))  # what the guard is for


@pytest.mark.slow
def test_trace_of_one_is_the_slope_along_the_whole_path():
    """Learning the rate alone with gamma=1, the signal is <g, w - w0> (Mechanic's), by hand."""
    with float64():
        tx = hyper(optax.adam, learning_rate=learn(0.01), by=optax.sgd(0.3), trace=Trace(gamma=1.0),
                   guards=Guards(normalize=False))  # fmt: skip
        start, batches, loss = model(jnp.float64)
        params, state, _ = run(tx, 6, jnp.float64)
        grads = jax.grad(loss)(params, batches[6])
        _, state = tx.update(grads, state, params)
        by_hand = sum(
            jnp.vdot(g, p - q) for g, p, q in zip(*map(jax.tree.leaves, (grads, params, start)))
        )
        assert float(state.signals["learning_rate"]) == pytest.approx(float(by_hand), rel=1e-9)


@pytest.mark.parametrize("trace", [Trace(gamma=0.7), Trace(power=1.0), Trace(power=2.0)])
def test_trace_weights_the_past_as_it_says(trace):
    with float64():
        tx = hyper(optax.sgd, learning_rate=learn(0.1), by=optax.sgd(0.0), trace=trace, guards=None)
        params, batches, loss = model(jnp.float64)
        state, steps = tx.init(params), []
        for batch in batches[:5]:
            grads = jax.grad(loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            signal = state.signals["learning_rate"]
            n = len(steps)
            if trace.power is None:
                weights = [trace.gamma ** (n - 1 - s) for s in range(n)]
            else:
                weights = [((s + 1) / n) ** trace.power for s in range(n)]
            want = sum(
                w
                * sum(jnp.vdot(g, u) for g, u in zip(jax.tree.leaves(grads), jax.tree.leaves(old)))
                for w, old in zip(weights, steps)
            )
            np.testing.assert_allclose(signal, want, rtol=1e-9, atol=1e-15)
            steps.append(updates)
            params = optax.apply_updates(params, updates)


@pytest.mark.slow
def test_a_held_out_gradient_can_be_the_judge():
    params, batches, loss = model()
    tx = plain(optax.sgd, learning_rate=learn(0.1))
    state = tx.init(params)
    grads = jax.grad(loss)(params, batches[0])
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    held_out = jax.grad(loss)(params, batches[9])
    second, state = tx.update(
        jax.grad(loss)(params, batches[1]), state, params, hyper_cotangent=held_out
    )
    want = sum(jnp.vdot(h, u) for h, u in zip(jax.tree.leaves(held_out), jax.tree.leaves(updates)))
    assert float(state.signals["learning_rate"]) == pytest.approx(float(want), rel=1e-5)
    # The parameters still move by the training gradient.
    train = jax.tree.leaves(jax.grad(loss)(params, batches[1]))
    np.testing.assert_allclose(
        jax.tree.leaves(second)[1], -state.values["learning_rate"] * train[1], rtol=1e-6
    )


def test_auto_takes_what_costs_least_and_says_so():
    params = {"w": jnp.zeros((100, 10))}
    size = 4000

    def cost(factory, **kwargs):
        return metaopt.describe(hyper(factory, by=optax.sgd(0.1), **kwargs).init(params))

    assert "closed signal, 0 extra bytes" in cost(
        optax.adamw, learning_rate=learn(1e-3), weight_decay=0.1
    )
    assert "closed signal, 0 extra bytes" in cost(
        optax.sgd, learning_rate=learn(1e-3), momentum=0.9
    )
    assert f"closed signal, {size:,} extra" in cost(
        optax.adam, learning_rate=learn(1e-3), b1=learn(0.9)
    )
    assert f"tangent signal, {size:,} extra" in cost(optax.lion, learning_rate=learn(1e-3))
    many = {
        "learning_rate": learn(0.1),
        "b1": learn(0.9),
        "b2": learn(0.9),
        "b3": learn(0.9),
        "eps": learn(1e-8),
    }
    assert "replay signal" in cost(
        optax.adan, **{**many, "weight_decay": learn(0.1), "eps_root": learn(1e-8)}
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["closed", "tangent", "replay"])
def test_scopes_split_the_signal(mode):
    """One value a leaf: signals add up to the global one; labels add up those of their leaves."""
    with float64():
        values = {"learning_rate": 0.05, "b1": 0.8}

        def signals(scope):
            tx = plain(optax.adam, mode=mode, by=optax.sgd(0.0), **learned(values, scope=scope))
            return run(tx, 3, jnp.float64)[1].signals

        leaf, all_ = signals("leaf"), signals("global")
        label = signals({"w1": "hidden", "w2": "head", "dead": "head"})
        for name in values:
            dead, w1, w2 = leaf[name]
            assert dead == 0 and w1 != 0 and w2 != 0
            np.testing.assert_allclose(w1 + w2, all_[name], rtol=1e-9)
            np.testing.assert_allclose(label[name], [w2, w1], rtol=1e-9)  # labels in their order
