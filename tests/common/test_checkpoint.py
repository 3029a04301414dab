"""What a run relies on: exact states back, on any mesh, from the newest checkpoint that is whole."""

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.checkpoint import (
    Checkpointer,
    CheckpointSpec,
    DamagedError,
    StructureError,
    _fingerprint,
    read_meta,
    restore_params,
)

ROOT = Path(__file__).parents[2]
# Orbax abandons its other reads when one fails; they complain when they finish, at any later time.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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


def abstract(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


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
        assert (checkpointer.latest(), checkpointer.steps()) == (None, [])
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
        assert checkpointer.latest() == 45


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


# --- damage ---------------------------------------------------------------------------------------


def array_data(checkpoint):
    return max((checkpoint / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 0x10
    path.write_bytes(data)


def change_a_digit(path):
    text = path.read_text()
    assert '"step": 2}' in text
    path.write_text(text.replace('"step": 2}', '"step": 3}'))


DAMAGE = {
    "array data cut": lambda c: truncate(array_data(c)),
    "array data gone": lambda c: array_data(c).unlink(),
    "a bit of array data, early": lambda c: flip(array_data(c), 0.2),
    "a bit of array data, middle": lambda c: flip(array_data(c), 0.5),
    "a bit of array data, late": lambda c: flip(array_data(c), 0.8),
    "manifest cut": lambda c: truncate(c / "state" / "manifest.ocdbt"),
    "manifest gone": lambda c: (c / "state" / "manifest.ocdbt").unlink(),
    "a bit of the manifest": lambda c: flip(c / "state" / "manifest.ocdbt"),
    "tree metadata cut": lambda c: truncate(c / "state" / "_METADATA"),
    "tree metadata gone": lambda c: (c / "state" / "_METADATA").unlink(),
    "meta cut": lambda c: truncate(c / "meta" / "data.json"),
    "meta gone": lambda c: (c / "meta" / "data.json").unlink(),
    "meta empty": lambda c: os.truncate(c / "meta" / "data.json", 0),
    "meta altered": lambda c: change_a_digit(c / "meta" / "data.json"),
    "everything gone but the directory": lambda c: [
        p.unlink() for p in c.rglob("*") if p.is_file()
    ],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_and_the_checkpoint_before_is_taken(tmp_path, caplog, damage):
    save_steps(tmp_path, 1, 2)
    DAMAGE[damage](tmp_path / "2")
    restored, meta = restore(tmp_path)
    assert_same(restored, make_state(1))
    assert meta == {"step": 1}
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "triptych"]
    assert re.match(r"checkpoint 2 is damaged \(.+\); falling back to step 1 in ", warning)


def test_any_flipped_byte_is_harmless_or_seen(tmp_path):
    """Walks a flip through every file: the state is exact, or its damage is reported. Never wrong."""
    save_steps(tmp_path, 2)
    seen = 0
    for path in [p for p in (tmp_path / "2").rglob("*") if p.is_file()]:
        whole = path.read_bytes()
        for where in (0.1, 0.45, 0.9):
            flip(path, where)
            try:
                restored, meta = restore(tmp_path)
            except DamagedError:
                seen += 1
            else:
                assert_same(restored, make_state(2))
                assert meta == {"step": 2}
            path.write_bytes(whole)
    assert seen >= 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.int4])
def test_the_fingerprint_sees_order_and_every_bit(dtype):
    x = jnp.arange(1, 7).reshape(2, 3).astype(dtype)
    changed = [x.T.reshape(2, 3), x[::-1], x[:, ::-1], x.at[0, 2].set(-3), x.at[1, 0].set(0)]
    assert len({int(_fingerprint(y)) for y in [x, *changed]}) == 6
    assert _fingerprint(jnp.zeros(3, dtype)) != _fingerprint(jnp.zeros(4, dtype))
    assert _fingerprint(jnp.float32(0.0)) != _fingerprint(jnp.float32(-0.0))


def test_a_damaged_step_asked_for_is_an_error(tmp_path):
    save_steps(tmp_path, 1, 2)
    flip(array_data(tmp_path / "2"))
    with pytest.raises(
        DamagedError, match=r"checkpoint 2 .*the content of .* is not what was saved"
    ):
        restore(tmp_path, step=2)


def test_when_all_are_damaged_the_error_tells_of_each(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "1" / "meta" / "data.json").unlink()
    truncate(tmp_path / "2" / "meta" / "data.json")
    with pytest.raises(DamagedError, match=r"2 .*JSONDecodeError.*; .*1 .*FileNotFoundError"):
        restore(tmp_path)


def test_after_a_fallback_the_run_writes_the_damaged_step_again(tmp_path, caplog):
    save_steps(tmp_path, 1, 2)
    truncate(array_data(tmp_path / "2"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore(abstract(make_state()))
        checkpointer.save(2, make_state(2), {"again": True}, wait=True)
        assert checkpointer.steps() == [1, 2]
        restored, meta = checkpointer.restore(abstract(make_state()))
    assert_same(restored, make_state(2))
    assert meta == {"again": True}
    assert len(list(tmp_path.glob("2.abandoned-*/meta/data.json"))) == 1
    assert "set aside" in caplog.text


def test_a_damaged_newest_does_not_push_out_good_ones(tmp_path):
    """With keep=1, the damaged step 5 would otherwise outlive every step saved before it."""
    save_steps(tmp_path, 1, 5, keep=2)
    truncate(array_data(tmp_path / "5"))
    with Checkpointer(tmp_path, CheckpointSpec(keep=1)) as checkpointer:
        checkpointer.restore(abstract(make_state()))
        checkpointer.save(2, make_state(2), {})
        checkpointer.save(3, make_state(3), {})
    assert_same(restore(tmp_path)[0], make_state(3))


def test_what_a_killed_save_left_is_ignored_and_removed(tmp_path):
    save_steps(tmp_path, 1)
    left = tmp_path / "2.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    (left / "state" / "half").write_bytes(b"...")
    assert read_meta(tmp_path) == {"step": 1}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1]
        checkpointer.restore(abstract(make_state()))
        checkpointer.save(3, make_state(3), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


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
    with pytest.raises(ValueError, match="format 2; this code reads 1"):
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
        assert checkpointer.latest() is None


def test_a_save_that_fails_in_the_background_is_raised_and_can_be_repeated(tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    async def full(*_):
        await asyncio.sleep(0.5)  # until the arrays are written: orbax would go on writing them
        raise OSError(28, "No space left on device")

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {}, wait=True)
        monkeypatch.setattr(ocp.handlers.JsonHandler, "_background_save", lambda *_, **__: full())
        checkpointer.save(2, make_state(2), {})
        with pytest.raises(OSError, match="No space left"):
            checkpointer.save(3, make_state(3), {})
        monkeypatch.undo()
        assert checkpointer.steps() == [1]
        checkpointer.save(2, make_state(2), {})
    assert_same(restore(tmp_path)[0], make_state(2))


# --- meshes ---------------------------------------------------------------------------------------

MESHES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P, SingleDeviceSharding
from common.checkpoint import Checkpointer

types = (getattr(AxisType, sys.argv[2]),)
big = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=types * 2)
small = jax.make_mesh((2,), ("fsdp",), axis_types=types, devices=jax.devices()[:2])
state = {"w": jnp.arange(128.0).reshape(8, 16), "v": jnp.arange(8).astype(jnp.bfloat16)}
state["key"] = jax.random.key(3)

def place(mesh, w, v):
    return {"w": NamedSharding(mesh, w), "v": NamedSharding(mesh, v), "key": NamedSharding(mesh, P())}

def abstract(sharding):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, sharding)

layouts = [
    place(big, P("fsdp", "tensor"), P("tensor")),
    place(big, P(None, ("tensor", "fsdp")), P()),
    place(small, P("fsdp"), P("fsdp")),
    dict.fromkeys(state, SingleDeviceSharding(jax.devices()[5])),
]
with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(0, jax.device_put(state, layouts[0]), {})
    for layout in layouts:
        restored, _ = checkpointer.restore(abstract(layout))
        assert jax.tree.map(lambda x: x.sharding, restored) == layout, layout
        for name in ("w", "v"):
            assert (np.asarray(restored[name]) == np.asarray(state[name])).all(), (name, layout)
        assert jax.random.uniform(jax.device_get(restored["key"])) == jax.random.uniform(state["key"])
    three = jax.make_mesh((3,), ("x",), axis_types=types, devices=jax.devices()[:3])
    try:
        checkpointer.restore(abstract(place(three, P("x"), P())))
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_any_mesh_restores_any_checkpoint(tmp_path, axis_type):
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", MESHES, tmp_path, axis_type],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | devices,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    assert re.match(r"abstract leaf w: .*partitioned 3 times", run.stdout)  # not taken for damage
    w = jnp.arange(128.0).reshape(8, 16)
    assert_same(restore_params(tmp_path, abstract(w), ("w",)), w)  # on the one device there is here


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
