"""What guards keep out, and count: NaN in gradients, signals and the upper optimizer's steps; a rate that stalls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
from metaopt import Guards, Rollback, Trace, auto, hyper, learn
from metaopt.auto import top
from metaopt.safe import safe_roots

PARAMS = {"w": jnp.array([1.0, -2.0, 0.3]), "dead": jnp.ones(2)}
GRADS = {"w": jnp.array([0.1, 0.2, -0.3]), "dead": jnp.zeros(2)}


def trained(tx, steps=4, params=PARAMS):
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(steps):
        grads = {"w": (1 + i) * params["w"], "dead": jnp.zeros(2)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


NAN = np.full(3, np.nan, np.float32)


@pytest.mark.parametrize("mode, held_out", [("closed", True), ("tangent", True), ("replay", False)])
def test_nan_gradients_change_nothing_whatever_the_signal_sees(mode, held_out):
    """Judged by a held-out gradient, or by a replay in which the array takes no part, a NaN is not in the signals."""
    mask = {"w": False, "dead": True}  # the decay alone is learned, and "w" has none
    tx = hyper(
        optax.adamw,
        learning_rate=0.1,
        weight_decay=learn(0.1),
        mask=mask,
        mode=mode,
        by=optax.sgd(0.1),
    )
    state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)[1]
    more = {"hyper_cotangent": GRADS} if held_out else {}
    updates, new = jax.jit(tx.update)({**GRADS, "w": NAN}, state, PARAMS, **more)
    assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, new, state)


def test_a_held_out_gradient_with_nan_is_a_signal_that_is_skipped():
    tx = hyper(optax.sgd, learning_rate=learn(0.1), by=optax.sgd(0.1))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    updates, state = tx.update(GRADS, state, PARAMS, hyper_cotangent={**GRADS, "w": NAN})
    np.testing.assert_allclose(updates["w"], -0.1 * GRADS["w"], rtol=1e-6)
    assert int(metaopt.learned(state)["skipped/learning_rate"]) == 1


@pytest.mark.parametrize("mode", ["closed", "tangent", "replay"])
def test_trees_that_do_not_match_are_refused(mode):
    tx = hyper(optax.sgd, learning_rate=learn(0.1), by=optax.sgd(0.1), mode=mode)
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    state = tx.init(params)
    swapped = {"a": params["b"], "b": params["a"]}
    others = [{"b": params["b"]}, [params["b"]], params["b"], list(params.values()), swapped]
    for other in others:
        with pytest.raises(ValueError, match="hyper_cotangent must be a tree like grads"):
            tx.update(params, state, params, hyper_cotangent=other)
        with pytest.raises(ValueError, match="grads must be a tree like params"):
            tx.update(other, state, params)
    with pytest.raises(ValueError, match=r"\['a'\] is missing, but has shape \(3,\)"):
        tx.update(params, state, params, hyper_cotangent=others[0])


def branched(learning_rate, b2):
    """Adam in a branch of a cond."""
    tx = optax.adam(learning_rate, b2=b2)

    def update(grads, state, params=None):
        first = lambda: tx.update(grads, state, params)  # noqa: E731
        return jax.lax.cond(state[0].count >= 0, first, lambda: (grads, state))

    return optax.GradientTransformation(tx.init, update)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tangent", "replay"])
def test_roots_of_zero_are_safe_inside_a_branch(mode):
    values = dict(learning_rate=learn(0.01), b2=learn(0.9), by=optax.sgd(0.1), mode=mode)
    ours, plain = (trained(hyper(f, **values))[1] for f in (branched, optax.adam))
    assert float(ours.signals["b2"]) != 0
    for name in ("b2", "learning_rate"):
        np.testing.assert_allclose(ours.values[name], plain.values[name], rtol=1e-6)
        assert int(metaopt.learned(ours)[f"skipped/{name}"]) == 0


@pytest.mark.parametrize("mode", ["tangent", pytest.param("replay", marks=pytest.mark.slow)])
def test_a_cube_root_learns(mode):
    """MADGRAD divides by the cube root of a sum that is zero where there was no gradient."""
    tx = hyper(optax.contrib.madgrad, learning_rate=learn(1e-3), by=optax.sgd(0.1), mode=mode)
    state = trained(tx)[1]
    assert float(state.values["learning_rate"]) > 1.1e-3 and "skipped" not in metaopt.describe(
        state
    )


def test_every_root_has_a_finite_slope_at_zero_and_its_own_elsewhere():
    def roots(x):
        x = x * x
        inside = jax.lax.scan(lambda c, _: (c + jnp.sqrt(x), None), x, length=2)[0]
        inside += jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (1, jnp.cbrt(x)), (0, x))[1]
        inside += jax.checkpoint(lambda: x ** jnp.float32(0.25))() + jax.lax.rsqrt(x + 1)
        return inside + jax.lax.cond(x.sum() > 0, lambda: x ** (1 / 3), lambda: x)

    def slope(f, x):
        return jax.jvp(f, (x,), (jnp.ones_like(x),))

    x = jnp.array([0.0, 2.0, -0.5])
    (value, ours), (want, theirs) = jax.jit(
        lambda x: (slope(safe_roots(roots), x), slope(roots, x))
    )(x)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert ours[0] == 0 and np.isnan(theirs[0])
    np.testing.assert_allclose(ours[1:], theirs[1:], rtol=1e-6)


@pytest.mark.parametrize("trace", [Trace(), Trace(power=1.0)])
def test_a_signal_that_never_is_a_number_is_counted_and_said(trace):
    """Also with a trace, where the derivative would have been left out without a word."""

    @jax.custom_jvp
    def unknown(x):
        return x

    unknown.defjvp(lambda x, dx: (x[0], dx[0] * jnp.nan))

    def factory(learning_rate, odd):
        return optax.chain(optax.sgd(learning_rate), optax.scale(unknown(odd)))

    tx = hyper(factory, learning_rate=0.01, odd=learn(1.0), by=optax.sgd(0.1), trace=trace)
    _, state = trained(tx, 5)
    values = metaopt.learned(state)
    assert int(values["skipped/odd"]) == 4 and float(values["odd"]) == 1
    assert metaopt.describe(state).endswith("; skipped 4 of 5 signals of odd")
    assert "skipped" not in metaopt.describe(jax.eval_shape(tx.init, PARAMS))


def test_a_step_of_the_top_that_is_no_number_is_not_taken():
    """Prodigy divides zero by zero as long as signals are zero; then it learns, since it stayed as it was."""
    tx = hyper(optax.adam, learning_rate=learn(1e-3), by=optax.contrib.prodigy())
    params, state = trained(tx, 6)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((params, state)))
    assert int(metaopt.learned(state)["skipped/by"]) >= 1
    assert float(state.values["learning_rate"]) != pytest.approx(1e-3, rel=1e-9)
    assert "steps of the level above" in metaopt.describe(state)


@pytest.mark.slow
def test_guards_that_are_not_given_stay_as_auto_has_them():
    """auto(guards=Guards(rollback=Rollback())) adds rollback and takes nothing away."""
    huge = {"w": 1e6 * PARAMS["w"], "dead": jnp.zeros(2)}
    norm = lambda tree: float(optax.tree.norm(tree))  # noqa: E731

    def first(**options):
        tx = auto(optax.sgd, learning_rate=1.0, **options)
        return norm(jax.jit(tx.update)(huge, tx.init(PARAMS), PARAMS, value=1.0)[0]) / norm(PARAMS)

    assert first() == pytest.approx(
        1e-3, rel=1e-4
    )  # a tenth, of which the first update gets a hundredth
    assert first(guards=Guards(rollback=Rollback())) == pytest.approx(1e-3, rel=1e-4)
    assert first(guards=Guards(max_move=0.5, settle=0)) == pytest.approx(0.5, rel=1e-4)
    for off in (Guards(max_move=0), None):
        assert first(guards=off) > 1e5, "said in so many words"


def test_a_rate_that_stalls_is_seen_and_can_be_set_again():
    """A small task without noise, where `auto` stalls: `of_peak` tells it, and the remedy of its docstring works."""
    tx = auto(optax.adam, learning_rate=0.1)
    target = jnp.array([1.0, -2.0, 3.0])

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(2 * (params - target), state, params)
            return (optax.apply_updates(params, updates), state), metaopt.learned(state)

        return jax.lax.scan(step, (params, state), length=2000)

    (params, state), log = train(jnp.zeros(3), tx.init(jnp.zeros(3)))
    part = log["of_peak/learning_rate"]
    np.testing.assert_allclose(
        part, log["learning_rate"] / np.maximum.accumulate(log["learning_rate"]), rtol=1e-4
    )
    assert part[:20].min() > 1e-2 and part[-1] < 1e-4
    (_, state), log = train(params, optax.tree.set(state, learning_rate=jnp.float32(0.01)))
    assert log["learning_rate"][0] == pytest.approx(0.01) and log["of_peak/learning_rate"][0] == 1


@pytest.mark.parametrize("what", ["auto", "hyper", "float16"])
def test_updates_that_are_not_finite_are_not_made(what):
    """Finite gradients, but not their product with the rate, or Adam's root in float16."""
    rate, dtype, size = 1e3, jnp.float32, 1e36
    tx = auto(optax.sgd, learning_rate=rate)
    if what == "hyper":
        tx = hyper(optax.sgd, learning_rate=learn(rate), by=optax.sgd(0.1))
    if what == "float16":
        tx, dtype, size = auto(optax.adamw), jnp.float16, 1e-3
    params = {"w": jnp.ones(50, dtype)}
    start = tx.init(params)
    updates, state = jax.jit(tx.update)({"w": jnp.full(50, size, dtype)}, start, params)
    assert np.all(updates["w"] == 0)
    counts = what != "hyper"  # max_move looks at the whole update
    assert int(metaopt.learned(state)["skipped/update"]) == counts
    if counts:
        np.testing.assert_array_equal(state.raws, start.raws)
        assert metaopt.describe(state).endswith("; skipped 1 of 1 updates of the parameters")
    if what == "float16":
        return
    for _ in range(3):  # and training goes on
        updates, state = jax.jit(tx.update)({"w": jnp.full(50, 1e-6, dtype)}, state, params)
        assert np.all(np.isfinite(updates["w"])) and np.any(updates["w"] != 0)


def test_an_update_too_large_to_be_squared_is_shortened_as_any_other():
    tx = hyper(optax.sgd, learning_rate=learn(10.0), by=optax.sgd(0.1), guards=Guards(max_move=0.1))
    for size in (1e25, 1e35):
        params, grads = {"w": jnp.ones(50)}, {"w": jnp.full(50, size)}
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-5)
        assert int(metaopt.learned(state)["skipped/update"]) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("factory", [optax.contrib.momo, optax.contrib.momo_adam, optax.polyak_sgd])
def test_a_loss_that_is_no_number_is_not_read(factory, bad):
    tx = hyper(
        factory,
        **{"max_learning_rate" if factory is optax.polyak_sgd else "learning_rate": learn(0.1)},
        by=top(),
    )
    update = jax.jit(tx.update)
    _, before = update(GRADS, tx.init(PARAMS), PARAMS, value=1.0)
    updates, state = update(GRADS, before, PARAMS, value=bad)
    assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, state.base, before.base)
    assert int(metaopt.learned(state)["skipped/update"]) == 1
    updates, state = update(GRADS, state, PARAMS, value=0.9)
    assert np.any(updates["w"] != 0) and np.isfinite(updates["w"]).all()


def test_one_huge_gradient_does_not_stop_learning_for_ever():
    """Its square is infinite, and so would be the running mean of squares."""
    tx = auto(optax.sgd, learning_rate=1e-2)
    params = {"w": jnp.ones(4)}

    @jax.jit
    def train(state, sizes):
        def step(state, size):
            _, state = tx.update({"w": jnp.full(4, size)}, state, params)
            return state, state.values["learning_rate"]

        return jax.lax.scan(step, state, sizes)

    state, _ = train(tx.init(params), jnp.ones(20).at[-1].set(1e20))
    state, rates = train(state, jnp.ones(100))
    assert int(metaopt.learned(state)["skipped/learning_rate"]) >= 1
    assert np.isfinite(np.asarray(state.guard.mean_square)).all()
    assert rates[-1] > 2 * rates[0], "the signal asks for more"
