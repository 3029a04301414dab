"""What a run relies on: exact states back, on any mesh, from the newest checkpoint that is whole."""

import asyncio
import json
import logging
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from common.checkpoint import (
    Checkpointer,
    CheckpointSpec,
    StructureError,
    read_meta,
    restore_params,
)
from common.full_disk import NoSpaceError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def make_state(step=0, width=24):
    keys = jax.random.split(jax.random.key(step), 3)
    params = {
        "encoder": {
            "w": jax.random.normal(keys[0], (512, width)),
            "scale": jax.random.normal(keys[1], (width,), jnp.bfloat16),
        },
        "head": {"w": jax.random.normal(keys[2], (width, 4))},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(jnp.int32(step), params, optimizer.init(params), jax.random.key(7))


def abstract(tree, sharding=None):
    if sharding is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        sharding = jax.tree.map(lambda _: device, tree)
    leaf = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(leaf, tree, sharding)


def bits(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x).tobytes()


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))


def save_steps(directory, *steps, **spec):
    with Checkpointer(directory, CheckpointSpec(**spec)) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"step": step})


def restore(directory, state=None, **kwargs):
    with Checkpointer(directory) as checkpointer:
        return checkpointer.restore(abstract(make_state() if state is None else state), **kwargs)


def test_nothing_to_restore(tmp_path):
    with Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.restore(abstract(make_state())) is None
        assert checkpointer.steps() == []
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .* holds steps \[\]"):
        read_meta(tmp_path / "new")


def test_a_state_comes_back_bit_for_bit_in_its_own_classes(tmp_path):
    state, meta = make_state(3), {"config": {"lr": 0.1, "sizes": [1, 2]}, "data": "scenes 1.0"}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, meta)
    restored, restored_meta = restore(tmp_path)
    assert_same(restored, state)
    assert restored_meta == meta == read_meta(tmp_path)
    assert jax.random.uniform(restored.key) == jax.random.uniform(state.key)


@pytest.mark.slow
def test_every_kind_of_array_survives(tmp_path):
    odd = np.array([0x7FC00123, 0x80000000, 1, 0xFF800000], np.uint32).view(np.float32)
    state = {
        "nan with payload, -0, denormal, -inf": jnp.asarray(odd),
        "scalar": jnp.int32(-5),
        "bool": jnp.array([True, False]),
        "int8": jnp.arange(-3, 3, dtype=jnp.int8),
        "int4": jnp.arange(-8, 8).astype(jnp.int4),
        "float8": jnp.linspace(-2, 2, 9).astype(jnp.float8_e4m3fn),
        "complex": jnp.array([1 + 2j, -3j], jnp.complex64),
        "no elements": jnp.zeros((0, 3), jnp.bfloat16),
        "keys": jax.random.split(jax.random.key(1), 3),
        "rbg": jax.random.key(2, impl="rbg"),
        "a.b": jnp.float32(1),
        "a": {"b": jnp.float32(2), "empty": {}, "none": None},
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, {})
    restored, _ = restore(tmp_path, state)
    assert_same(restored, state)


def test_names_alone_tie_arrays_to_a_state(tmp_path):
    """An optimizer library that renames its classes, or a dict in their place, reads old checkpoints."""
    save_steps(tmp_path, 1)
    adam = make_state(1).opt_state[1][0]
    renamed = {"count": adam.count, "mu": adam.mu, "nu": adam.nu}
    restored = restore_params(tmp_path, abstract(renamed), ("opt_state", "1", "0"))
    assert_same(restored, renamed)


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {str(i): jnp.zeros((512, 512)) for i in range(8)}
    with Checkpointer(tmp_path, CheckpointSpec(keep=3)) as checkpointer:
        for step in range(3):
            checkpointer.save(step, state, {})
            state = advance(state)
        for step in range(3):
            saved, _ = checkpointer.restore(abstract(state), step)
            assert all((np.asarray(x) == step).all() for x in saved.values())


def test_the_newest_and_the_permanent_ones_stay(tmp_path):
    save_steps(tmp_path, 10, 20, 25, 30, 35, 45, keep=2, every_steps=20)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [20, 35, 45]


@pytest.mark.parametrize("bad", [{"keep": 0}, {"every_steps": -1}])
def test_a_bad_spec_is_refused_with_its_values(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}.*at least"):
        CheckpointSpec(**bad)


def test_an_older_step_on_request(tmp_path):
    save_steps(tmp_path, 1, 2)
    restored, meta = restore(tmp_path, step=1)
    assert_same(restored, make_state(1))
    assert meta == {"step": 1} == read_meta(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 5 in .* holds steps \[1, 2\]"):
        restore(tmp_path, step=5)


# --- another model, another run -------------------------------------------------------------------


def test_a_mismatch_lists_everything_that_differs_and_does_not_fall_back(tmp_path, caplog):
    save_steps(tmp_path, 1, 2)
    state = make_state()
    params = {
        "encoder": {"weight": state.params["encoder"]["w"], "scale": jnp.zeros(24)},
        "head": {"w": jnp.zeros((24, 10)), "b": jnp.zeros(10)},
    }
    other = State(state.step, params, state.opt_state, state.key)
    with pytest.raises(StructureError) as error:
        restore(tmp_path, other)
    assert str(tmp_path / "2") in str(error.value)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "missing: params/encoder/weight (nearest: params/encoder/w)",
        "missing: params/head/b (nearest: params/encoder/w)",
        "unexpected: params/encoder/w (nearest: params/encoder/weight)",
        "misshapen: params/encoder/scale is bfloat16[24] in the checkpoint, float32[24] in the model",
        "misshapen: params/head/w is float32[24, 4] in the checkpoint, float32[24, 10] in the model",
    ]
    assert not [r for r in caplog.records if r.name == "triptych"]


def test_a_format_from_the_future_is_an_error_not_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("common.checkpoint.FORMAT_VERSION", 2)
    save_steps(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 2 is newer than 1"):
        restore(tmp_path)


def test_part_of_a_state(tmp_path):
    save_steps(tmp_path, 1, 2)
    state = make_state(2)
    assert_same(restore_params(tmp_path, abstract(state.params)), state.params)
    head = state.params["head"]
    assert_same(restore_params(tmp_path, abstract(head), ("params", "head")), head)
    assert_same(restore_params(tmp_path, abstract(make_state(1)), (), step=1), make_state(1))
    with pytest.raises(StructureError, match="missing: params/head/scale"):
        restore_params(tmp_path, abstract(state.params["encoder"]), ("params", "head"))
    with pytest.raises(FileNotFoundError):
        restore_params(tmp_path / "nowhere", abstract(head))


def test_abstract_leaves_without_a_sharding_go_to_the_default_device(tmp_path):
    save_steps(tmp_path, 1)
    params = restore_params(tmp_path, jax.eval_shape(make_state).params)
    assert_same(params, make_state(1).params)


def test_saving_the_current_step_again_does_nothing(tmp_path):
    save_steps(tmp_path, 4)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore(abstract(make_state()))
        checkpointer.save(4, make_state(4), {"second": True})
        checkpointer.save(5, make_state(5), {"first": True})
        checkpointer.save(5, make_state(5), {"second": True})
    assert (read_meta(tmp_path, 4), read_meta(tmp_path, 5)) == ({"step": 4}, {"first": True})


def test_another_runs_step_is_not_overwritten(tmp_path):
    save_steps(tmp_path, 4)
    error = pytest.raises(FileExistsError, match="another run's step 4: restore it")
    with Checkpointer(tmp_path) as checkpointer, error:
        checkpointer.save(4, make_state(4), {})


def test_going_back_sets_the_newer_history_aside(tmp_path):
    save_steps(tmp_path, 1, 2, 3, keep=3)
    with Checkpointer(tmp_path, CheckpointSpec(keep=3)) as checkpointer:
        checkpointer.restore(abstract(make_state()), step=1)
        assert checkpointer.steps() == [1, 2, 3]  # reading alone changes nothing
        checkpointer.save(2, make_state(20), {}, wait=True)
        assert checkpointer.steps() == [1, 2]
    assert_same(restore(tmp_path)[0], make_state(20))
    assert {p.name[:11] for p in tmp_path.glob("*.*")} == {"2.abandoned", "3.abandoned"}


@pytest.mark.parametrize(
    "state, error, match",
    [
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, ValueError, "'a/b'"),
        ({"x": np.ones(3)}, TypeError, "state leaf x is a ndarray"),
        ({"x": 1.0}, TypeError, "state leaf x is a float"),
    ],
)
def test_a_state_that_cannot_be_saved_exactly_is_refused(tmp_path, state, error, match):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(error, match=match):
            checkpointer.save(0, state, {})
        checkpointer.save(0, {"x": jnp.ones(3)}, {}, wait=True)
        assert checkpointer.steps() == [0]


def test_meta_that_is_not_json_is_refused_at_once(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpointer.save(0, make_state(), {"when": object()})
        assert checkpointer.steps() == []


JSON_HANDLER = "common._orbax.ocp.handlers.JsonHandler"


def test_a_save_that_fails_in_the_background_is_raised_and_can_be_repeated(tmp_path, monkeypatch):
    async def full(*_):
        await asyncio.sleep(0.5)  # until the arrays are written: orbax would go on writing them
        raise OSError(28, "No space left on device")

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {}, wait=True)
        monkeypatch.setattr(f"{JSON_HANDLER}._background_save", lambda *_, **__: full())
        checkpointer.save(2, make_state(2), {})
        with pytest.raises(OSError, match="No space left"):
            checkpointer.save(3, make_state(3), {})
        monkeypatch.undo()
        assert checkpointer.steps() == [1]
        checkpointer.save(2, make_state(2), {})
    assert_same(restore(tmp_path)[0], make_state(2))


TENSORSTORE = "RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 3: No space left on device [os_error_code='28']"


def in_the_background(saver, monkeypatch):
    async def full(*_):
        await asyncio.sleep(0.5)  # as above
        raise ValueError(TENSORSTORE)

    monkeypatch.setattr(f"{JSON_HANDLER}._background_save", lambda *_, **__: full())
    saver.save(2, make_state(2), {})


def in_what_it_surrounds(saver, monkeypatch):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", [in_the_background, in_what_it_surrounds])
def test_a_full_disk_is_one_line_that_names_the_last_good_step(
    tmp_path, monkeypatch, caplog, where
):
    with pytest.raises(NoSpaceError) as caught, Checkpointer(tmp_path) as saver:
        saver.save(1, make_state(1), {}, wait=True)
        where(saver, monkeypatch)
    assert str(caught.value) == (
        f"no space left on {tmp_path.parent}: free some and start the same command again; "
        "the last good checkpoint is step 1"
    )
    assert caplog.text == "", "no tracebacks from orbax's threads"
    monkeypatch.undo()
    with Checkpointer(tmp_path) as saver:
        saver.restore(abstract(make_state()))
        saver.save(2, make_state(2), {})
    assert_same(restore(tmp_path)[0], make_state(2))


# --- meshes ---------------------------------------------------------------------------------------


def layouts(axis_type, saved):
    """Ways to lay out {"w": [8, 16], "v": [8], "key"}: an 8-device mesh twice, 2 devices, and 1."""
    big = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)
    small = jax.make_mesh((2,), ("fsdp",), axis_types=(axis_type,), devices=jax.devices()[:2])
    shard = jax.NamedSharding
    return [
        {
            "w": shard(big, P("fsdp", "tensor")),
            "v": shard(big, P("tensor")),
            "key": shard(big, P()),
        },
        {
            "w": shard(big, P(None, ("tensor", "fsdp"))),
            "v": shard(big, P()),
            "key": shard(big, P()),
        },
        {"w": shard(small, P("fsdp")), "v": shard(small, P("fsdp")), "key": shard(small, P())},
        dict.fromkeys(saved, jax.sharding.SingleDeviceSharding(jax.devices()[5])),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_any_mesh_restores_any_checkpoint(tmp_path, axis_type):
    state = {"w": jnp.arange(128.0).reshape(8, 16), "v": jnp.arange(8).astype(jnp.bfloat16)}
    state["key"] = jax.random.key(3)
    ways = layouts(axis_type, state)
    with Checkpointer(tmp_path, CheckpointSpec(keep=9)) as checkpointer:
        for step, layout in enumerate(ways):
            checkpointer.save(step, jax.device_put(state, layout), {})
        for step in range(len(ways)):
            for layout in ways:
                restored, _ = checkpointer.restore(abstract(state, layout), step)
                assert jax.tree.map(lambda x: x.sharding, restored) == layout
                assert_same(restored, state)


def test_a_mesh_that_does_not_divide_an_array_is_not_taken_for_damage(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"w": jnp.ones((8, 16))}, {})
        mesh = jax.make_mesh((3,), ("x",), devices=jax.devices()[:3])
        thirds = {"w": jax.NamedSharding(mesh, P("x"))}
        with pytest.raises(ValueError, match=r"abstract leaf w: .*partitioned 3 times"):
            checkpointer.restore(abstract({"w": jnp.ones((8, 16))}, thirds))


# --- quiet ----------------------------------------------------------------------------------------


def test_orbax_is_quiet_at_info(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.INFO, "absl")
    save_steps(tmp_path, 1, 2)
    restore(tmp_path)
    assert [r.getMessage() for r in caplog.records if r.name != "triptych"] == []


def test_the_meta_file_is_plain_json(tmp_path):
    save_steps(tmp_path, 1)
    document = json.loads((tmp_path / "1" / "meta" / "data.json").read_text())
    assert document["format_version"] == 1
    assert document["meta"] == {"step": 1}
    assert document["leaves"]["params/encoder/scale"][:2] == ["bfloat16", [24]]
    assert "opt_state/1/0/mu/head/w" in document["leaves"]
