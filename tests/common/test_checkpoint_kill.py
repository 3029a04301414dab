"""What is on disk is not to be trusted: kills in the middle of a save, cut files, flipped bits."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.array_fingerprint import array_fingerprint
from common.checkpoint import (
    Checkpointer,
    CheckpointSpec,
    DamagedError,
    read_meta,
)
from tests.common.test_checkpoint import abstract, assert_same, make_state, restore, save_steps

ROOT = Path(__file__).parents[2]
# Orbax abandons its other reads when one fails; they complain when they finish, at any later time.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# --- kills ----------------------------------------------------------------------------------------

LEAVES, SIZE = 5, 1 << 20  # 20 MB of float32

# Restores what the killed run before it left, then saves until it is killed itself. The content of a
# state is its step; "done" is printed only when a save has been waited for.
RUN = f"""
import sys
import jax, jax.numpy as jnp, numpy as np
from common.checkpoint import Checkpointer, CheckpointSpec

make = jax.jit(lambda step: {{str(i): jnp.full({SIZE}, step + i, jnp.float32) for i in range({LEAVES})}})
with Checkpointer(sys.argv[1], CheckpointSpec(keep=2)) as checkpointer:
    found = checkpointer.restore(jax.eval_shape(make, jnp.int32(0)))
    step = -1
    if found is not None:
        step = found[1]["step"]
        for i in range({LEAVES}):
            assert (np.asarray(found[0][str(i)]) == step + i).all(), "content of another step"
    print("restored", step, flush=True)
    while True:
        step += 1
        print("saving", step, flush=True)
        checkpointer.save(step, make(jnp.int32(step)), {{"step": step}})
        checkpointer.wait()
        print("done", step, flush=True)
"""


def run_and_kill(directory, saves: int, delay: float) -> tuple[int, int]:
    """Kills a run `delay` seconds into its (saves+1)-th save; (step it restored, last step done)."""
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", RUN, directory],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},  # one device; here are eight
    )
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line.split())
        if sum(word == "saving" for word, _ in lines) > saves:
            time.sleep(delay)
            child.send_signal(signal.SIGKILL)
            break
    out, err = child.communicate(timeout=60)
    lines += [line.split() for line in out.splitlines() if len(line.split()) == 2]
    assert child.returncode == -signal.SIGKILL, err
    assert "damaged" not in err, err
    done = [int(step) for word, step in lines if word == "done"]
    return int(lines[0][1]), max(done, default=-1)


@pytest.mark.slow
def test_a_killed_run_continues_from_its_last_save(tmp_path):
    chance = random.Random()  # where a kill falls is up to the machine's load in any case
    done = -1
    for _ in range(3):
        saves, delay = chance.randrange(4), chance.uniform(0, 0.15)
        restored, last = run_and_kill(tmp_path, saves, delay)
        # The save that the kill fell into may have got through; one that had been waited for must have.
        assert done <= restored <= done + 1, (saves, delay)
        done = max(restored, last)
    with Checkpointer(tmp_path) as checkpointer:
        like = {str(i): jax.ShapeDtypeStruct((SIZE,), jnp.float32) for i in range(LEAVES)}
        found = checkpointer.restore(like)
        assert found is not None or done == -1
        if found is not None:
            step = found[1]["step"]
            assert step in (done, done + 1)
            assert all((np.asarray(found[0][str(i)]) == step + i).all() for i in range(LEAVES))
        checkpointer.save(done + 2, {"x": jnp.ones(3)}, {})
    left = [path.name for path in tmp_path.iterdir() if not path.name.isdigit()]
    assert left == [], "temporary directories of killed runs"


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


@pytest.mark.slow
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
    assert len({int(array_fingerprint(y)) for y in [x, *changed]}) == 6
    assert array_fingerprint(jnp.zeros(3, dtype)) != array_fingerprint(jnp.zeros(4, dtype))
    assert array_fingerprint(jnp.float32(0.0)) != array_fingerprint(jnp.float32(-0.0))


def test_a_damaged_step_asked_for_is_an_error(tmp_path):
    save_steps(tmp_path, 1, 2)
    flip(array_data(tmp_path / "2"))
    with pytest.raises(
        DamagedError, match=r"checkpoint 2 .*the content of .* is not what was saved"
    ):
        restore(tmp_path, step=2)


@pytest.mark.slow
def test_when_all_are_damaged_the_error_tells_of_each(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "1" / "meta" / "data.json").unlink()
    truncate(tmp_path / "2" / "meta" / "data.json")
    with pytest.raises(DamagedError, match=r"2 .*JSONDecodeError.*; .*1 .*FileNotFoundError"):
        restore(tmp_path)


@pytest.mark.slow
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


@pytest.mark.slow
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
