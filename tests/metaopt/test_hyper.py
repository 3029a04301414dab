"""What a user relies on: plain optax where nothing is learned, towers of any height, errors before training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
from metaopt import Guards, Rollback, Trace, hyper, learn
from metaopt.inspect import levels
from tests.metaopt.small import CASES, SGD, alone, float64, learned, model, run


@pytest.mark.parametrize(
    "guards",
    [Guards(), Guards(normalize=False, max_change=0, skip_nonfinite=False)],
    ids=["guarded", "bare"],
)
@pytest.mark.parametrize("case", CASES)
def test_learning_at_rate_zero_is_plain_optax(case, guards):
    factory, values, constants = CASES[case]
    with float64():
        tx = hyper(factory, by=optax.sgd(0.0), guards=guards, **learned(values), **constants)
        ours, state, losses = run(tx, 12, jnp.float64)
        theirs, base, want = run(alone(factory(**values, **constants)), 12, jnp.float64)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), ours, theirs
        )
        assert jax.tree.structure(state.base) == jax.tree.structure(base)
        np.testing.assert_allclose(losses, want, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("height", [1, 2, 3, 12])
def test_towers_of_any_height(height):
    """Each level learns the rate of the level below; a level above costs numbers, not copies of the model."""
    tx = optax.sgd(0.01)
    for _ in range(height):
        tx = hyper(optax.adam, learning_rate=learn(0.01), by=tx)
    _, state, losses = run(tx, 6)
    rates = [
        v
        for k, v in metaopt.learned(state).items()
        if k.removeprefix("by/" * k.count("by/")) == "learning_rate"
    ]
    assert len(rates) == height and len(set(map(float, rates))) >= min(height, 3)
    assert min(rates) > 0 and losses[-1] < losses[0]
    upper = jax.tree.leaves(state.by) if height > 1 else []
    assert sum(x.size for x in upper) < 30 * height
    assert len(upper) <= 3, "an array for each dtype, however high"


@pytest.mark.slow
def test_a_tower_equals_its_levels_written_out():
    """SGD / SGD / SGD with raw rates, against the paper's recursion (docs/papers/gdtuo.md 1.2) in ten lines."""
    with float64():
        raw = lambda v: learn(v, bijector="raw")  # noqa: E731
        top = hyper(optax.sgd, learning_rate=raw(0.02), by=optax.sgd(0.03), guards=None)
        tx = hyper(optax.sgd, learning_rate=raw(0.1), by=top, guards=None)
        ours, state, _ = run(tx, 8, jnp.float64)

        params, batches, loss = model(jnp.float64)
        alpha, kappa, h_last = 0.1, 0.02, 0.0
        last = jax.tree.map(jnp.zeros_like, params)
        for batch in batches[:8]:
            g = jax.grad(loss)(params, batch)
            h = -sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(last)))
            kappa -= 0.03 * (-h * h_last)
            alpha -= kappa * h
            params = jax.tree.map(lambda p, g, a=alpha: p - a * g, params, g)
            last, h_last = g, h
        assert float(state.values["learning_rate"]) == pytest.approx(float(alpha), rel=1e-13)
        assert float(levels(state)[1].values["learning_rate"]) == pytest.approx(
            float(kappa), rel=1e-13
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), ours, params)


def test_it_learns_a_whole_chain():
    """Any function that returns a transformation is a factory; the clipping norm is learned, too."""

    def clipped(rate, norm):
        return optax.chain(optax.clip_by_global_norm(norm), optax.adamw(rate))

    tx = hyper(clipped, rate=learn(1e-3), norm=learn(0.1), by=optax.sgd(0.1))
    _, state, losses = run(tx, 20)
    values = metaopt.learned(state)
    assert losses[-1] < losses[0]
    assert values["rate"] > 1.1e-3 and values["norm"] != pytest.approx(0.1)


@pytest.mark.slow
def test_a_factor_in_front_of_a_schedule():
    schedule = optax.linear_schedule(0.2, 0.0, 10)
    tx = hyper(optax.sgd, learning_rate=learn(1.0, schedule=schedule), by=optax.sgd(0.0))
    ours, state, _ = run(tx, 7)
    theirs, _, _ = run(optax.sgd(schedule), 7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)
    assert float(state.values["learning_rate"]) == pytest.approx(float(schedule(6)))
    moving = hyper(optax.sgd, learning_rate=learn(1.0, schedule=schedule), by=optax.sgd(0.1))
    assert run(moving, 7)[1].raw["learning_rate"] > 0.1  # the factor, on its own, has grown


def test_each_label_is_an_optimizer_of_its_own():
    """Labelled rates of SGD move as those of separate optimizers on the parts."""
    with float64():
        labels = {"w1": "hidden", "w2": "head", "dead": "head"}
        one = lambda: dict(by=optax.sgd(0.1), guards=Guards(normalize=False))  # noqa: E731
        ours = run(
            hyper(optax.sgd, learning_rate=learn(0.1, scope=labels), **one()), 9, jnp.float64
        )[0]
        parts = {k: hyper(optax.sgd, learning_rate=learn(0.1), **one()) for k in ("hidden", "head")}
        theirs = run(optax.partition(parts, labels), 9, jnp.float64)[0]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), ours, theirs)


def test_a_scope_keeps_a_global_norm_global():
    """A chain with clipping and a rate a leaf, all rates equal: the same as one rate."""

    def clipped(learning_rate):
        return optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(learning_rate, momentum=0.9))

    runs = [
        run(hyper(clipped, learning_rate=learn(0.1, scope=s), by=optax.sgd(0.0)), 5)[0]
        for s in ("leaf", "global")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *runs)


def test_learned_finds_every_level_anywhere():
    inner = hyper(optax.adam, learning_rate=learn(1e-2), b1=learn(0.9), by=optax.sgd(0.01))
    tower = hyper(optax.sgd, learning_rate=learn(0.1, scope="leaf"), by=inner)
    tx = optax.MultiSteps(optax.chain(optax.clip(1.0), tower), 2)
    state = tx.init(model()[0])
    values = metaopt.learned(state)
    rate = {
        "learning_rate",
        "signal/learning_rate",
        "skipped/learning_rate",
        "of_peak/learning_rate",
        "skipped/by",
        "skipped/update",
    }
    decay = {"by/b1", "by/signal/b1", "by/skipped/b1"}
    assert set(values) == rate | {f"by/{name}" for name in rate} | decay
    assert values["learning_rate"].shape == (3,)
    assert metaopt.describe(state).count("level") == 2
    with pytest.raises(ValueError, match=r"no metaopt\.hyper"):
        metaopt.learned(optax.adam(1e-3).init(model()[0]))


def needs(message):
    return pytest.raises((TypeError, ValueError), match=message)


def test_wrong_inputs_are_refused_before_training():
    by = SGD
    cases = [
        (r"adam has no keyword 'lr'; it takes learning_rate, b1", optax.adam, dict(lr=learn(0.1))),
        (r"missing a required argument: 'learning_rate'", optax.adam, dict(b1=learn(0.9))),
        (r"nothing to learn", optax.adam, dict(learning_rate=0.1)),
        (r"b1 of lion has no one-step hypergradient", optax.lion, dict(learning_rate=0.1, b1=learn(0.9))),
        (r"b2 of lion has no one-step hypergradient", optax.lion, dict(learning_rate=0.1, b2=learn(0.9))),
        (r"ns_steps of muon cannot be learned.* int 5", optax.contrib.muon,
         dict(learning_rate=0.1, ns_steps=learn(5.0))),
        (r"nesterov of sgd cannot be learned.* bool False", optax.sgd,
         dict(learning_rate=0.1, nesterov=learn(1.0))),
        (r"strictly between 0 and inf", optax.sgd, dict(learning_rate=learn(-0.1))),
        (r"strictly between 0 and 1", optax.adam, dict(learning_rate=0.1, b1=learn(1.0))),
        (r"outside its bounds \(0.1, 1\)", optax.sgd, dict(learning_rate=learn(2.0, bounds=(0.1, 1)))),
        (r"give the factory, optax.adamw", optax.adam(0.1), {}),
        (r"no closed form of lion", optax.lion, dict(learning_rate=learn(0.1), mode="closed")),
        (r"keeps no tangents to trace", optax.adam,
         dict(learning_rate=learn(0.1), mode="closed", trace=Trace(gamma=0.9))),
        (r'mode=.magic.: give "auto"', optax.adam, dict(learning_rate=learn(0.1), mode="magic")),
        (r"settle=5 must not be negative, and needs max_move", optax.adam,
         dict(learning_rate=learn(0.1), guards=Guards(settle=5))),
        (r"max_move changes the rate 'learning_rate', which is not learned", optax.adam,
         dict(learning_rate=0.1, b1=learn(0.9), guards=Guards(max_move=0.1))),
    ]  # fmt: skip
    for message, factory, kwargs in cases:
        with needs(message):
            hyper(factory, by=by, **kwargs)
    for wrong in (0.1, optax.sgd, None):
        with needs("is not an optax transformation"):
            hyper(optax.sgd, by=wrong, learning_rate=learn(0.1))
    with needs("only a real number can be learned"):
        learn(lambda count: 0.1)
    with needs("not finite"):
        learn(float("nan"))
    with needs("known: log, logit"):
        learn(0.1, bijector="exp")
    with needs("must share one"):
        two = hyper(
            optax.adam, by=by, learning_rate=learn(0.1, scope="leaf"), b1=learn(0.9, scope={"a": 0})
        )
        two.init({"a": jnp.ones(2)})
    with needs("2 labels for 1 arrays"):
        hyper(optax.sgd, by=by, learning_rate=learn(0.1, scope=["a", "b"])).init([jnp.ones(2)])


def test_wrong_kinds_are_said_with_the_remedy():
    rate = dict(learning_rate=learn(0.1), by=SGD)
    schedule = optax.constant_schedule(0.1)
    cases = [
        (r"trace=0.9: give Trace\(gamma", lambda: hyper(optax.sgd, trace=0.9, **rate)),
        (r"trace=None", lambda: metaopt.auto(optax.sgd, trace=None)),
        (r"guards=\{\}: give Guards", lambda: hyper(optax.sgd, guards={}, **rate)),
        (r"guards=True: give Guards", lambda: metaopt.auto(optax.sgd, guards=True)),
        (r"max_move='a'\): give a number", lambda: metaopt.auto(optax.sgd, guards=Guards(max_move="a"))),
        (r"rollback=True\): give Rollback\(\)", lambda: metaopt.auto(optax.sgd, guards=Guards(rollback=True))),
        (r"max_change=nan", lambda: hyper(optax.sgd, guards=Guards(max_change=float("nan")), **rate)),
        (r"deviations=nan\) must be finite", lambda: Rollback(deviations=float("nan"))),
        (r"share=-3\) must be", lambda: Rollback(share=-3)),
        (r"every=1.5\): give a whole number", lambda: Rollback(every=1.5)),
        (r"every=nan\): give a whole number", lambda: Rollback(every=float("nan"))),
        (r"cut='x'\): give a number", lambda: Rollback(cut="x")),
        (r"gamma='1'\): give a number", lambda: Trace(gamma="1")),
        (r"power=nan\) must be finite", lambda: Trace(power=float("nan"))),
        (r"skip_nonfinite='no'\): give True or False",
         lambda: metaopt.auto(optax.sgd, guards=Guards(skip_nonfinite="no"))),
        (r"bounds=\(-1.0, 0.5\) reach beyond what the log",
         lambda: metaopt.auto(optax.sgd, learning_rate=learn(0.1, bounds=(-1.0, 0.5)))),
        (r"bounds=\(-1, 2\) reach beyond what the logit",
         lambda: hyper(optax.adam, b1=learn(0.9, bounds=(-1, 2)), **rate)),
        (r"bounds=\(None, 1\): give two numbers", lambda: learn(0.1, bounds=(None, 1))),
        (r"bounds=\(1, 0\): the lower one", lambda: learn(0.1, bounds=(1, 0))),
        (r"bijector=3: give a Bijector", lambda: learn(0.1, bijector=3)),
        (r"'adam'.*give the factory itself.*not str", lambda: metaopt.auto("adam")),
        (r"inject_hyperparams keeps it in the optimizer state",
         lambda: metaopt.auto(optax.inject_hyperparams(optax.adam))),
        (r"learn\(1.0, schedule=...\)", lambda: metaopt.auto(optax.adam, learning_rate=schedule)),
        (r"learn\(1.0, schedule=...\)", lambda: learn(schedule)),
        (r"traced here", lambda: jax.jit(lambda r: learn(r).init)(0.1)),
        (r"lower_bound of momo_adam has no one-step", lambda: hyper(
            optax.contrib.momo_adam, lower_bound=learn(0.1), **rate)),
    ]  # fmt: skip
    for message, make in cases:
        with needs(message):
            make()
    metaopt.auto(optax.sgd, guards=Guards(max_move=np.float32(0.1), settle=np.int64(5)))
    assert learn(jnp.float32(0.5)).init == learn(np.array(0.5)).init == learn(0.5).init


def test_parameters_without_a_gradient_are_refused():
    params = {"w": jnp.ones(2), "n": jnp.arange(2)}
    tx = metaopt.auto(optax.adamw)
    with needs(r"params\['n'\] is int32, which has no gradient.*optax.partition"):
        tx.init(params)
    tx = optax.partition({"a": tx, "b": optax.set_to_zero()}, {"w": "a", "n": "b"})
    updates, _ = tx.update(params, tx.init(params), params)
    assert not updates["n"].any() and updates["w"].all()
