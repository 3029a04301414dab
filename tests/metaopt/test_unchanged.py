"""The user's train step, types, sharding and checkpoints stay as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import metaopt
from common.checkpoint import Checkpointer
from metaopt import Guards, Rollback, hyper, learn
from tests.metaopt.small import CASES, alone, learned, model, run

MODES = ["closed", "tangent", "replay"]


def tower(mode="auto", **guards):
    return hyper(
        optax.adamw, learning_rate=learn(1e-2), b2=learn(0.99), weight_decay=learn(0.1), mode=mode,
        by=hyper(optax.adam, learning_rate=learn(1e-2), by=optax.sgd(0.1)), guards=Guards(**guards),
    )  # fmt: skip


def close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), a, b)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@pytest.mark.parametrize(
    "make", [*(lambda m=m: tower(m) for m in MODES), lambda: metaopt.auto(optax.adamw)]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_types_never_change(make, dtype):
    """bf16 parameters keep their type, hyperparameters are float32, and the state fits into a scan."""
    tx = make()
    params, batches, loss = model(dtype)
    grads = jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)
    updates, new = jax.eval_shape(tx.update, grads, state, params)
    assert types(new) == types(jax.eval_shape(lambda: state))
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
    assert all(v.dtype == jnp.float32 for v in state.values.values())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_a_program_of_strict_types_takes_it(dtype):
    """Even where plain optax.adam is refused, whose own code counts on jax's standard promotion."""
    schedule = optax.cosine_decay_schedule(1.0, 10)
    made = [
        metaopt.auto(
            optax.adamw,
            learning_rate=learn(1.0, schedule=schedule),
            guards=Guards(rollback=Rollback()),
        ),
        *(hyper(CASES[c][0], by=tower(), **learned(CASES[c][1])) for c in ("momentum", "nadam")),
    ]
    params = {"w": jnp.ones((3, 2), dtype)}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for tx in made:
            state = jax.eval_shape(tx.init, params)
            _, new = jax.eval_shape(
                lambda p, s, tx=tx: tx.update(p, s, p, value=jnp.float32(1)), params, state
            )
            assert types(new) == types(state)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_trains(mode):
    _, state, losses = run(tower(mode), 20, jnp.bfloat16)
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:5])
    assert 0.9 < float(state.values["b2"]) < 1 and float(
        state.values["learning_rate"]
    ) != pytest.approx(1e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zero_gradients_are_harmless(mode, dtype):
    params, _, _ = model(dtype)
    tx = hyper(
        optax.adam,
        learning_rate=learn(1e-3),
        b2=learn(0.99),
        eps=1e-4,
        by=optax.sgd(0.1),
        mode=mode,
    )
    state = tx.init(params)
    zeros, update = jax.tree.map(jnp.zeros_like, params), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(zeros, state, params)
        assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates))
    assert all(np.isfinite(v) for v in metaopt.learned(state).values())


def test_empty_trees():
    for params in ({}, {"w": jnp.zeros((0, 3))}):
        tx = metaopt.auto(optax.adamw)
        updates, state = tx.update(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert float(state.values["learning_rate"]) == pytest.approx(1e-3)


def test_masked_and_partitioned_trees():
    """Only a part is trained: as if the rest were not there."""
    part = {"w1": True, "w2": True, "dead": False}
    masked = run(optax.masked(tower(), part), 8)
    labels = {k: "train" if v else "freeze" for k, v in part.items()}
    frozen = run(optax.partition({"train": tower(), "freeze": optax.set_to_zero()}, labels), 8)
    for name in ("w1", "w2"):
        np.testing.assert_allclose(masked[0][name], frozen[0][name], rtol=1e-6)
    a, b = metaopt.learned(masked[1]), metaopt.learned(frozen[1])
    close(a, b)
    assert float(a["learning_rate"]) != pytest.approx(1e-2)


def test_clipping_inside_equals_clipping_before():
    """Before: the signal is that of the clipped gradient. Inside a factory: of the raw one. The first two updates agree."""

    def inside(learning_rate):
        return optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(learning_rate))

    a = hyper(inside, learning_rate=learn(0.1), by=optax.sgd(0.1))
    b = optax.chain(
        optax.clip_by_global_norm(0.1),
        hyper(optax.sgd, learning_rate=learn(0.1), by=optax.sgd(0.1)),
    )
    (pa, sa, _), (pb, sb, _) = run(a, 2), run(b, 2)
    close(pa, pb)  # normalised signals: the sign is what counts in the first step
    raw, clipped = (metaopt.learned(s)["signal/learning_rate"] for s in (sa, sb))
    assert abs(float(raw)) > 1.5 * abs(float(clipped))


@pytest.mark.slow
def test_multisteps_equals_a_large_batch():
    k = 4
    params, batches, loss = model()
    large = [
        jax.tree.map(lambda *b: jnp.concatenate(b), *batches[i : i + k]) for i in range(0, 24, k)
    ]
    whole, many = tower(), alone(optax.MultiSteps(tower(), k).gradient_transformation())
    p, s = params, whole.init(params)
    gradient, update = jax.jit(jax.grad(loss)), jax.jit(whole.update)
    for batch in large:
        updates, s = update(gradient(p, batch), s, p)
        p = optax.apply_updates(p, updates)
    q, t = params, many.init(params)
    update = jax.jit(many.update)
    for batch in batches[:24]:
        updates, t = update(gradient(q, batch), t, q)
        q = optax.apply_updates(q, updates)
    close(p, q, 1e-4)
    close(metaopt.learned(s)["learning_rate"], metaopt.learned(t)["learning_rate"], 1e-4)


def test_ema_of_parameters_rides_along():
    tx = alone(optax.chain(tower(), optax.ema(0.9)))
    ours, state, losses = run(tx, 10)
    assert np.isfinite(losses).all()
    assert {"learning_rate", "b2", "weight_decay", "by/learning_rate"} < set(metaopt.learned(state))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))


def big(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "w1": jnp.asarray(rng.standard_normal((16, 8)) / 4, jnp.float32),
        "w2": jnp.asarray(rng.standard_normal((8, 8)) / 4, jnp.float32),
    }
    xs = jnp.asarray(rng.standard_normal((6, 32, 16)), jnp.float32)

    def loss(p, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ p["w1"]) @ p["w2"] - 1))

    return params, xs, loss


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    lambda: tower("closed"), lambda: tower("replay"),
    lambda: metaopt.auto(optax.adamw, guards=Guards(max_move=0.1, rollback=Rollback())),
], ids=["closed", "replay", "auto"])  # fmt: skip
def test_fsdp_on_eight_devices_gives_the_same_numbers(make, mesh):
    params, xs, loss = big()
    tx = make()

    def step(params, state, x):
        now, grads = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params, value=now)
        return optax.apply_updates(params, updates), state

    one = jax.jit(step)
    p, s = params, tx.init(params)
    for x in xs:
        p, s = one(p, s, x)

    split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    shardings = jax.tree.map(lambda _: split, params)
    abstract = jax.eval_shape(tx.init, params)
    state_shardings = optax.tree_utils.tree_map_params(
        tx, lambda _, sharding: sharding, abstract, shardings, transform_non_params=lambda _: whole
    )
    buffers = [x for x in jax.tree.leaves(state_shardings) if x == split]
    assert len(buffers) >= 4  # moments, and what the signal keeps, lie where the parameters lie
    many = jax.jit(
        step,
        in_shardings=(shardings, state_shardings, split),
        out_shardings=(shardings, state_shardings),
    )
    q = jax.device_put(params, shardings)
    t = jax.jit(tx.init, out_shardings=state_shardings)(q)
    for x in xs:
        q, t = many(q, t, x)
    close(p, jax.device_get(q), 1e-4)
    close(metaopt.learned(s), jax.device_get(metaopt.learned(t)), 1e-3)


@pytest.mark.slow
def test_axis_name_sums_the_parts_of_split_parameters(mesh):
    """In shard_map each device holds a slice of the parameters; one psum gives every device the whole signal."""
    params, xs, loss = big()
    gradients = [jax.jit(jax.grad(loss))(params, x) for x in xs[:3]]
    options = dict(learning_rate=learn(0.1), by=optax.sgd(0.1), guards=Guards(max_move=0.05))
    whole, parts = hyper(optax.sgd, **options), hyper(optax.sgd, axis_name="fsdp", **options)

    def values(tx, params, gradients):
        state = tx.init(params)
        for grads in gradients:
            _, state = tx.update(grads, state, params)
        return state.values["learning_rate"]

    split = jax.shard_map(
        lambda p, g: values(parts, p, g),
        mesh=mesh,
        in_specs=P("fsdp"),
        out_specs=P(),
        check_vma=False,
    )
    np.testing.assert_allclose(
        jax.jit(split)(params, gradients),
        jax.jit(lambda p, g: values(whole, p, g))(params, gradients),
        rtol=1e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    tower, lambda: metaopt.auto(optax.sgd, guards=Guards(max_move=0.1, rollback=Rollback())),
], ids=["tower", "auto"])  # fmt: skip
def test_save_and_restore_in_mid_run_is_bit_exact(make, tmp_path):
    tx = make()
    params, batches, loss = model()

    @jax.jit
    def step(params, state, batch):
        now, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, value=now)
        return optax.apply_updates(params, updates), state

    p, s = params, tx.init(params)
    for i, batch in enumerate(batches[:10]):
        if i == 5:
            with Checkpointer(tmp_path / "run") as saver:
                saver.save(5, {"params": p, "opt_state": s}, {}, wait=True)
        p, s = step(p, s, batch)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        {"params": params, "opt_state": tx.init(params)},
    )
    with Checkpointer(tmp_path / "run") as saver:
        restored = saver.restore(abstract)
    assert restored is not None
    q, t = restored[0]["params"], restored[0]["opt_state"]
    for batch in batches[5:10]:
        q, t = step(q, t, batch)
    jax.tree.map(np.testing.assert_array_equal, (p, s), (q, t))
