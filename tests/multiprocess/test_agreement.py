"""Processes that would not compute the same end together, each with the same plain line."""

import subprocess
import sys

import pytest

from tests.multiprocess.processes import (
    ENVIRONMENT,
    ROOT,
    finish,
    free_address,
    reported,
    start,
)

pytestmark = pytest.mark.multiproc

AGREE = """
me, errors = jax.process_index(), []

def compare(facts, **kwargs):
    try:
        distributed.require_same(facts, **kwargs)
        errors.append("")
    except distributed.ProcessesDiffer as error:
        errors.append(str(error))

compare({"lr": "0.1", "code": "a"})
compare({"lr": f"0.{me}", "code": "a"})
if me == 1:
    distributed.report_failure("no folder /data")
else:
    compare({})
if me == 0:
    distributed.report_failure("no folder /data")
else:
    compare({})
if me == 0:
    compare({}, seconds=0.5)
report(errors=errors)
"""


def test_processes_hear_what_differs_and_who_has_stopped(tmp_path):
    processes = start(AGREE, tmp_path)
    for process, (_, err) in zip(processes, finish(processes)):
        assert process.returncode == 0, err
    errors = [reported(tmp_path, i)["errors"] for i in range(2)]
    differ = "the processes of this run differ: lr is 0.0 on process 0, 0.1 on process 1"
    late = "process 1 has not come within 0 s to be compared with the others"
    assert errors[0] == ["", differ, "process 1 stopped: no folder /data", late]
    assert errors[1] == ["", differ, "process 0 stopped: no folder /data"]


CONFIGS = ROOT / "experiments"


def test_a_run_with_two_seeds_ends_on_both_processes(tmp_path):
    config = CONFIGS / "jepa" / "configs" / "scenes.py:smoke"
    line = "error: the processes of this run differ: config.train.seed is 3 on process 0, 4 on process 1"
    address = free_address()
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "experiments.launch", f"--config={config}"),
                *(f"--workdir={tmp_path / 'run'}", f"--coordinator={address}"),
                *("--num_processes=2", f"--process_id={i}", f"--config.train.seed={3 + i}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        for i in range(2)
    ]
    for process, (_, err) in zip(processes, finish(processes)):
        assert process.returncode == 2, err
        assert err.splitlines()[-1] == line, err
    assert not (tmp_path / "run").exists()
