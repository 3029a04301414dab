"""Two processes on one machine are one job: they compute together and stop together."""

import signal

import pytest

from tests.multiprocess.processes import finish, reported, start

pytestmark = pytest.mark.multiproc

PSUM = """
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from common.metrics import compute, mean
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, P("data"))
local = np.arange(4.0, dtype=np.float32) + 4 * jax.process_index()
x = jax.make_array_from_process_local_data(sharding, local)
psum = jax.shard_map(lambda x: jax.lax.psum(x.sum(), "data"), mesh=mesh, in_specs=P("data"),
                     out_specs=P())
weight = (x != 7).astype(np.float32)  # a padded row on the second process
metrics = jax.jit(lambda x, w: {"x": mean(x, w)})(x, weight)
distributed.barrier("done")
report(devices=jax.device_count(), psum=float(jax.jit(psum)(x)), mean=compute(metrics)["x"])
"""

ALONE = """
try:
    if jax.process_index() == 0:
        distributed.barrier("save", seconds=1)
except jax.errors.JaxRuntimeError as error:
    report(error=str(error))
"""

STOP = """
with distributed.PreemptionGuard() as guard:
    print("ready", flush=True)
    for step in range(10_000):
        if guard.reached(step):
            for _ in range(2):  # a name serves again
                distributed.barrier("save")
            report(reached=step)
            sys.exit(distributed.EXIT_PREEMPTED)
        time.sleep(0.01)
"""


def test_a_sum_and_a_mean_over_a_global_array(tmp_path):
    processes = start(PSUM, tmp_path)
    outputs = finish(processes)
    for i, (process, (out, err)) in enumerate(zip(processes, outputs)):
        assert process.returncode == 0, err
        assert f"process {i} of 2: 2 of 4 devices (cpu)" in out
        assert reported(tmp_path, i) == {"devices": 4, "psum": 28.0, "mean": 3.0}


def test_a_barrier_names_the_process_that_does_not_come(tmp_path):
    finish(start(ALONE, tmp_path))
    assert "timed out task names:\n1\n" in reported(tmp_path, 0)["error"]


@pytest.mark.parametrize("which, signum", [(0, signal.SIGTERM), (1, signal.SIGUSR1)])
def test_a_signal_to_one_process_stops_both_at_the_same_step(which, signum, tmp_path):
    processes = start(STOP, tmp_path)
    try:
        for process in processes:
            while "ready" not in (line := process.stdout.readline()):
                assert line, process.stderr.read()
        processes[which].send_signal(signum)
    finally:
        outputs = finish(processes)
    steps = []
    for i, (process, (_, err)) in enumerate(zip(processes, outputs)):
        assert process.returncode == 75, err
        steps.append(reported(tmp_path, i)["reached"])
    assert steps[0] == steps[1] < 5000
