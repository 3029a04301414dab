"""Two processes on one machine are one job: they compute together and stop together."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.multiproc

JOIN = """
import json, sys, time
import jax
from common import distributed
jax.config.update("jax_num_cpu_devices", 2)
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
"""

REPORT = """
def report(**found):
    \"\"\"Into a file: the collectives library writes to stdout in pieces.\"\"\"
    with open(sys.argv[3], "w") as file:
        json.dump(found, file)
"""

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


def start(program, folder):
    """Starts the program as process 0 and 1 of a job of two; each may `report` once."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONFAULTHANDLER": "1"}
    env.pop("XLA_FLAGS", None)
    return [
        subprocess.Popen(
            [sys.executable, "-c", JOIN + REPORT + program, address, str(i), folder / f"{i}.json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for i in range(2)
    ]


def finish(processes):
    """Their outputs, once all have ended; none outlives the test, and those that hang tell where."""
    try:
        return [p.communicate(timeout=60) for p in processes]
    except subprocess.TimeoutExpired:
        for p in processes:
            p.send_signal(signal.SIGABRT)
        pytest.fail("\n".join(p.communicate(timeout=60)[1] for p in processes))
    finally:
        for p in processes:
            p.kill()


def reported(folder, i):
    return json.loads((folder / f"{i}.json").read_text())


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
