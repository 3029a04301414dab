"""Which devices a task takes, and how one process hears that it must stop."""

import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from common import distributed
from common.distributed import (
    PreemptionGuard,
    barrier,
    differences,
    initialize,
    report_failure,
    require_same,
    slurm_local_device_ids,
)


def slurm(task, tasks_per_node, node=0, **env):
    fixed = {"SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_NODEID": str(node)}
    return slurm_local_device_ids({"SLURM_LOCALID": str(task), **fixed, **env})


@pytest.mark.parametrize(
    "task, per_node, env, ids",
    [
        (0, "1(x2)", {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3]),
        (2, "4(x2)", {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, [2]),
        (1, "2", {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [4, 5, 6, 7]),
        (3, "4", {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "4"}, [0]),
        (3, "4", {"CUDA_VISIBLE_DEVICES": "3"}, [0]),
        (1, "2", {"ROCR_VISIBLE_DEVICES": "0,1"}, [1]),
        (1, "2", {"SLURM_GPUS_ON_NODE": "8"}, [4, 5, 6, 7]),
        (1, "2", {}, []),
        (1, "2", {"JAX_LOCAL_DEVICE_IDS": "5,7", "CUDA_VISIBLE_DEVICES": "0"}, [5, 7]),
    ],
    ids=["a node", "a gpu", "a share", "bound", "bound, no total", "amd", "unset", "cpu", "told"],
)
def test_slurm_tasks_share_the_gpus_of_their_node(task, per_node, env, ids):
    assert slurm(task, per_node, **env) == ids


def test_slurm_nodes_may_differ():
    gpus = {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert slurm(0, "2(x2),1", node=1, **gpus) == [0]
    assert slurm(0, "2(x2),1", node=2, **gpus) == [0, 1]


def test_gpus_that_cannot_be_shared_are_an_error():
    with pytest.raises(ValueError, match="3 tasks cannot share 4 GPUs"):
        slurm(0, "3", CUDA_VISIBLE_DEVICES="0,1,2,3")


def test_a_slurm_step_of_several_tasks_starts_jax_with_its_share(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    for name in distributed._SLURM:
        monkeypatch.setenv(name, "1")
    initialize()
    assert calls == []  # one task is one process
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")
    monkeypatch.setenv("SLURM_NODEID", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    initialize()
    assert calls == [((), {"cluster_detection_method": "slurm", "local_device_ids": [1]})]


def test_a_tpu_host_asks_its_pod_and_colab_has_none(monkeypatch):
    calls = []
    monkeypatch.setattr(distributed, "_on_tpu_vm", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", lambda: calls.append("asked"))
    initialize()
    assert calls == ["asked"]

    def no_cluster():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    initialize()

    def broken():
        raise ValueError("metadata server is down")

    monkeypatch.setattr(jax.distributed, "initialize", broken)
    with pytest.raises(ValueError, match="metadata"):  # alone, it would overwrite its peers' work
        initialize()


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ([{"lr": "1", "seed": "0"}] * 3, ""),
        ([{"lr": "1"}, {"lr": "1"}, {"lr": "2"}], "lr is 1 on processes 0, 1, 2 on process 2"),
        ([{"lr": "1"}, {}], "lr is 1 on process 0, (absent) on process 1"),
        ([{}, {"lr": "1"}], "lr is (absent) on process 0, 1 on process 1"),
        ([{"a": "1", "b": "2"}, {"a": "2", "b": "1"}], "a is 1 on process 0, 2 on process 1; b is"),
        ([dict.fromkeys("abcdef", str(p)) for p in (0, 1)], "d is 0 on process 0, 1 on process 1; and 2 more"),
        ([{"a": "1"}] * 9 + [{"a": "2"}], "1 on processes 0, 1, 2, 3 ..., 2 on process 9"),
    ],
)  # fmt: skip
def test_what_differs_is_named_with_its_processes(facts, line):
    found = differences(facts)
    assert line in found and bool(found) == bool(line) and "\n" not in found


def test_half_given_flags_are_an_error():
    with pytest.raises(ValueError, match="all or none"):
        initialize("localhost:1234", num_processes=2)


def test_a_laptop_is_one_process(capsys):
    initialize()
    barrier("alone")
    require_same({"lr": "0.1"})
    report_failure("alone")
    assert not jax.distributed.is_initialized()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_seen_at_the_next_step_and_the_old_handler_comes_back(signum):
    old = []
    before = signal.signal(signum, lambda *args: old.append(args[0]))
    try:
        with PreemptionGuard() as guard:
            assert not guard.reached(0)
            os.kill(os.getpid(), signum)
            assert guard.reached(1) and guard.reached(2)
        assert old == []
        os.kill(os.getpid(), signum)
        assert old == [signum]
    finally:
        signal.signal(signum, before)


def test_the_default_action_comes_back_too():
    with PreemptionGuard():
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_signals_at_once_are_one():
    with PreemptionGuard() as guard:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert guard.reached(0)


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_does_not_stop():
    program = (
        "import time; from common.distributed import PreemptionGuard\n"
        "with PreemptionGuard() as guard:\n"
        "    print('ready', flush=True)\n"
        "    while not guard.reached(0): time.sleep(0.01)\n"
        "    print('stopping', flush=True)\n"
        "    time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    try:
        assert child.stdout.readline() == "ready\n"
        child.terminate()
        assert child.stdout.readline() == "stopping\n"
        time.sleep(1.2 * distributed._DUPLICATE_SECONDS)
        child.terminate()
        assert child.wait(timeout=20) == -signal.SIGTERM
    finally:
        child.kill()
        child.stdout.close()


def test_a_guard_in_another_thread_is_harmless():
    answers = []

    def run():
        with PreemptionGuard() as guard:
            answers.append(guard.reached(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False]
