"""The processes of a run have one workdir, and find out at the start if they do not. None waits forever."""

import jax
import jax.numpy as jnp
import pytest

from common.checkpoint import Checkpointer
from tests.multiprocess.test_two_processes import finish, reported, start

pytestmark = pytest.mark.multiproc

PROGRAM = """
from pathlib import Path
import jax.numpy as jnp
from common import workdir
from common.checkpoint import Checkpointer, DamagedError
from common.evaluation import run_evals
from common.lease import HeldError, Lease
from common.workdir import WorkdirError, hold

workdir.SIGHT = 0.5
own, folder = jax.process_index(), Path(sys.argv[3]).parent

try:
    with hold(folder / f"own{own}" / "run"):
        blind = "nobody"
except WorkdirError as error:
    blind = str(error)

try:
    with hold(folder / "file"):
        pass
except WorkdirError as error:
    refused = str(error)

with hold(folder / "shared") as shared:
    distributed.barrier("held")
    try:
        Lease(shared / workdir.HELD)
        other = "is let in"
    except HeldError as error:
        other = str(error)
    distributed.barrier("tried")

with Checkpointer(folder / f"own{own}" / "checkpoints") as saver:
    steps = saver.steps()
    try:
        saver.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(
            jax.local_devices()[0]))})
        restored = "yes"
    except DamagedError as error:
        restored = str(error)

def fails_on_one(state):
    yield "fine", 1.0
    if own:
        raise ValueError("half a file")

row, failed = run_evals({"a": fails_on_one, "b": lambda state: [("fine", 2.0)]}, None, 3, folder)
report(blind=blind, refused=refused, other=other, steps=steps, restored=restored, row=row, failed=failed)
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes reports."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "file").write_text("")
    with Checkpointer(folder / "own0" / "checkpoints") as saver:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        saver.save(4, {"x": jax.device_put(jnp.ones(3), here)}, {})
    processes = start(PROGRAM, folder)
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [reported(folder, i) for i in range(2)]


def test_a_workdir_that_one_process_does_not_see_is_refused_by_all(both):
    for found in both:
        assert (
            found["blind"].startswith("process 1 (") and "own1/run) does not see" in found["blind"]
        )
        assert "the workdir of process 0 (" in found["blind"]
        assert "one folder that every host shares" in found["blind"] and "\n" not in found["blind"]


def test_a_workdir_that_cannot_be_is_refused_by_all(both):
    for found in both:
        assert "/file is not a folder" in found["refused"]


def test_the_processes_of_one_run_hold_it_together_and_nobody_else(both):
    for found in both:
        assert found["other"].startswith("process "), found["other"]


def test_checkpoints_that_one_process_does_not_see_stop_all_at_once(both):
    for found in both:
        assert found["steps"] == [4], "as the first process lists them"
        assert "checkpoint 4 is damaged" in found["restored"]


def test_an_evaluation_that_fails_on_one_process_has_failed_on_all(both):
    for found in both:
        assert found["row"] == {"a_failed": 1.0, "b/fine": 2.0}
        assert "ValueError: half a file" in found["failed"]["a"]
