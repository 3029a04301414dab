"""SIGKILL at any moment of saving loses at most the save in flight."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.checkpoint import Checkpointer

ROOT = Path(__file__).parents[2]
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
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
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
        abstract = {str(i): jax.ShapeDtypeStruct((SIZE,), jnp.float32) for i in range(LEAVES)}
        found = checkpointer.restore(abstract)
        assert found is not None or done == -1
        if found is not None:
            step = found[1]["step"]
            assert step in (done, done + 1)
            assert all((np.asarray(found[0][str(i)]) == step + i).all() for i in range(LEAVES))
        checkpointer.save(done + 2, {"x": jnp.ones(3)}, {})
    left = [path.name for path in tmp_path.iterdir() if not path.name.isdigit()]
    assert left == [], "temporary directories of killed runs"
