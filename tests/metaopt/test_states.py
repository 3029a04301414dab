"""The state as a user handles it: saved by flax, donated, read and set by optax's own functions, on an Explicit mesh."""

import copy

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import metaopt
from metaopt import Guards, Rollback, hyper, learn
from metaopt.pack import pack

PARAMS = {"w": jnp.array([1.0, -2.0, 0.3]), "dead": jnp.ones(2)}


def tower(mode="auto", **guards):
    """Three levels."""
    rate = dict(learning_rate=learn(0.02))
    return hyper(
        optax.adamw, learning_rate=learn(0.01), b2=learn(0.9), weight_decay=learn(0.1), mode=mode,
        by=hyper(optax.adam, **rate, by=hyper(optax.adam, **rate, by=optax.sgd(0.1))), guards=Guards(**guards),
    )  # fmt: skip


MAKE = {
    "auto": lambda: metaopt.auto(optax.adamw, guards=Guards(rollback=Rollback())),
    "closed": lambda: tower("closed"),
    "tangent": lambda: tower("tangent"),
    "replay": lambda: tower("replay", rollback=Rollback()),
    "keeps_params": lambda: metaopt.auto(
        optax.contrib.madgrad
    ),  # optax's state holds the parameters themselves
}


def stepper(tx, **jit):
    def step(params, state):
        grads = {"w": 2 * params["w"], "dead": jnp.zeros(2)}
        updates, state = tx.update(grads, state, params, value=jnp.ones(()))
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **jit)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("make", [
    "auto", "replay", "keeps_params", *(pytest.param(m, marks=pytest.mark.slow) for m in ("closed", "tangent"))
])  # fmt: skip
def test_states_are_donated_and_saved_by_flax(make):
    """No buffer twice in a fresh state, nor in common with the parameters; bytes come back, and train on alike."""
    tx = MAKE[make]()
    step = stepper(tx, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    params, state = step(params, tx.init(params))
    restored = flax.serialization.from_bytes(tx.init(PARAMS), flax.serialization.to_bytes(state))
    same(restored, state)
    same(jax.tree.map(jnp.copy, metaopt.learned(restored)), metaopt.learned(state))
    copied = jax.tree.map(jnp.copy, params)
    same(step(copied, jax.tree.map(jnp.asarray, restored)), step(params, state))


def test_states_of_one_layout_are_one_structure():
    """To jax, and to what copies them."""
    a, b = (pack({"a": jnp.ones(3), "n": (pack({"b": jnp.ones(())}),)}) for _ in range(2))
    assert jax.tree.structure(a) == jax.tree.structure(b) and type(copy.deepcopy(a)) is type(b)
    assert jax.tree.structure(a) != jax.tree.structure(pack({"a": jnp.ones(2)}))


def test_bytes_of_another_tower_are_refused():
    """flax does not look at shapes, but at names: also where the other state is of the same size."""
    rate = lambda by: hyper(optax.adam, learning_rate=learn(0.1), by=by)  # noqa: E731
    low, high = rate(rate(optax.sgd(0.1))), rate(rate(rate(optax.sgd(0.1))))
    adagrad, momentum = rate(optax.adagrad(0.1)), rate(optax.sgd(0.1, momentum=0.9))
    for ours, theirs in ((low, high), (momentum, adagrad)):
        saved = flax.serialization.to_bytes(theirs.init(PARAMS))
        with pytest.raises(ValueError, match="keys do not match"):
            flax.serialization.from_bytes(ours.init(PARAMS), saved)
    # What looks at neither is found out by the numbers.
    with pytest.raises(ValueError, match="saved from another optimizer"):
        by = high.init(PARAMS).by.vectors
        wrong = low.init(PARAMS)
        low.update(PARAMS, wrong._replace(by=wrong.by._replace(vectors=by)), PARAMS)


@pytest.mark.slow
def test_optax_reads_and_sets_the_rate():
    """`optax.tree.get` finds one value; what `optax.tree.set` puts there is what the next update uses."""
    tx = tower("closed")
    step, params, state = stepper(tx), PARAMS, tx.init(PARAMS)
    for _ in range(4):
        params, state = step(params, state)
    for name in ("learning_rate", "b2", "weight_decay"):
        assert optax.tree.get(state, name) is state.values[name]
    assert int(optax.tree.get(state, "count")) == 4  # Adam's
    moving = step(params, state)[1].values["weight_decay"]
    _, state = step(params, optax.tree.set(state, learning_rate=0.5))
    assert float(state.values["learning_rate"]) == pytest.approx(0.5, rel=1e-6)
    assert float(state.raw["learning_rate"]) == pytest.approx(np.log(0.5), rel=1e-6)
    assert float(state.values["weight_decay"]) == float(moving), "the others go on learning"
    assert float(metaopt.learned(state)["of_peak/learning_rate"]) == 1
    _, after = step(params, state)
    assert 0 < abs(np.log(float(after.values["learning_rate"]) / 0.5)) <= 0.2 + 1e-5, (
        "learning goes on from there"
    )
    for wrong, want in ((-1.0, None), (np.nan, None), (1e9, 1e6)):
        _, after = step(params, optax.tree.set(state, learning_rate=wrong))
        rate = float(after.values["learning_rate"])
        assert rate == pytest.approx(want) if want else 0.4 < rate < 0.62, wrong


def test_a_value_that_is_set_includes_its_schedule():
    schedule = lambda count: 0.1 * count  # noqa: E731, a warm-up from zero
    tx = hyper(optax.sgd, learning_rate=learn(1.0, schedule=schedule), by=optax.sgd(0.0))
    step, state = stepper(tx), tx.init(PARAMS)
    _, state = step(
        PARAMS, optax.tree.set(state, learning_rate=0.3)
    )  # the first rate that is not zero is 0.1
    params, state = step(PARAMS, state)
    assert float(state.values["learning_rate"]) == pytest.approx(0.3, rel=1e-6)
    _, state = step(
        PARAMS, optax.tree.set(state, learning_rate=0.6)
    )  # twice as large, and so from now on
    assert float(state.values["learning_rate"]) == pytest.approx(1.2, rel=1e-6)


MAKE["small"] = lambda: hyper(optax.sgd, learning_rate=learn(0.1), by=optax.sgd(0.1))


SLOW = [pytest.param(make, marks=pytest.mark.slow) for make in ("auto", "replay")]


@pytest.mark.slow
@pytest.mark.parametrize("make", ["small", *SLOW])
def test_types_hold_on_an_explicit_mesh_without_jit(make):
    """optax's own test: an eager update, whose state has the shardings of the first."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(None, "x"))
        params = {"w": jnp.zeros((2, 8, 4), jnp.float16, out_sharding=sharding)}
        tx = MAKE[make]()
        state = tx.init(params)
        updates, new = tx.update(params, state, params, value=jnp.ones(()))
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new)
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)


def test_learned_names_every_tower_of_a_partition():
    one, two = metaopt.auto(optax.adam), tower("closed")
    tx = optax.partition({"matrices": one, "rest": two}, {"w": "matrices", "dead": "rest"})
    state = jax.eval_shape(tx.init, PARAMS)
    parts = {
        f"{label}/{name}"
        for label, part in (("matrices", one), ("rest", two))
        for name in metaopt.learned(jax.eval_shape(part.init, PARAMS))
    }
    assert set(metaopt.learned(state)) == parts and "rest/by/by/learning_rate" in parts
    assert metaopt.describe(state).count("rest, level") == 3
    chain = metaopt.learned(jax.eval_shape(optax.chain(one, one).init, PARAMS))
    assert {"0/learning_rate", "1/learning_rate"} < set(chain)


def test_learned_gives_arrays_inside_flax_nnx():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tower("closed"), wrt=nnx.Param)  # noqa: TID251, what users have
    values = metaopt.learned(optimizer.opt_state)
    assert len(values) > 10 and all(isinstance(v, jax.Array) for v in values.values())
    assert "level 2" in metaopt.describe(optimizer.opt_state)
