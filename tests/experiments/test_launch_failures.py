"""What goes wrong on the machine, not in a setting: one plain line and an exit code, or a traceback where it is our bug."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver

from common import distributed
from experiments import jobs, launch, reproduce

CONFIGS = {
    "jepa": "experiments/jepa/configs/scenes.py:smoke",
    "metaopt": "experiments/metaopt/configs/mnist_towers.py:smoke",
    "sinks": "experiments/sinks/configs/pretrain.py:smoke",
}


def launched(monkeypatch, *arguments):
    argv = ["launch", *arguments]
    with monkeypatch.context() as patch, flagsaver.flagsaver():
        patch.setattr(sys, "argv", argv)
        return launch.main(argv)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Launches a config whose job is `job`: (exit code, stderr)."""

    def run(job):
        monkeypatch.setattr(jobs, "find", lambda name: job)
        arguments = (f"--config={CONFIGS['jepa']}", f"--workdir={tmp_path / 'run'}")
        return launched(monkeypatch, *arguments), capsys.readouterr().err

    return run


def out_of_memory(run):
    return np.asarray(jnp.zeros(2**50))  # a pebibyte


def no_mesh(run):
    raise NotImplementedError(
        "Failed to find assignment for logical_axis_index 1 of size 16 with remaining assignable mesh [8, 8, 0].\nMore"
    )


def no_backend(run):
    raise RuntimeError("Unable to initialize backend 'tpu': no libtpu (set JAX_PLATFORMS='' to ..)")


@pytest.mark.parametrize(
    ("job", "code", "words"),
    [
        (out_of_memory, 1, ["Out of memory allocating", "train.batch", "accumulate", "remat"]),
        (no_mesh, 2, ["remaining assignable mesh [8, 8, 0]", "config.mesh"]),
        (no_backend, 2, ["'tpu': no libtpu. Unset JAX_PLATFORMS"]),
    ],
)
def test_trouble_of_the_machine_is_one_line(run, job, code, words):
    found, text = run(job)
    assert found == code and text.startswith("error: ") and text.count("\n") == 1, text
    assert [word for word in words if word not in text] == [], text


@pytest.mark.parametrize(
    "bug",
    [ValueError("x"), NotImplementedError("x"), jax.errors.JaxRuntimeError("INTERNAL: x")],
    ids=repr,
)
def test_a_bug_keeps_its_traceback(run, bug):
    def job(run):
        raise bug

    with pytest.raises(type(bug), match="x"):
        run(job)


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier\nmore"), "DEADLINE_EXCEEDED: Barr"),
        (AssertionError(), "no device of JAX_PLATFORMS=" + os.environ["JAX_PLATFORMS"]),
    ],
    ids=repr,
)
def test_hosts_that_cannot_be_joined_are_one_line(run, monkeypatch, raised, words):
    def initialize(*args):
        raise raised

    monkeypatch.setattr(distributed, "initialize", initialize)
    code, text = run(lambda *args: 0)
    assert code == 2 and text.count("\n") == 1 and words in text, text


@pytest.mark.parametrize("paper", CONFIGS)
@pytest.mark.parametrize("workdir", ["gs://bucket/run", "s3://bucket/run", "gs:/bucket/run"])
def test_no_job_takes_a_bucket_for_its_workdir(monkeypatch, tmp_path, capsys, paper, workdir):
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    config = os.path.abspath(CONFIGS[paper])
    monkeypatch.chdir(tmp_path)
    assert launched(monkeypatch, f"--config={config}", f"--workdir={workdir}") == 2
    text = capsys.readouterr().err
    assert f"--workdir={workdir}" in text and text.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_reproduce_ends_a_part_that_runs_out_of_memory_with_a_line(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(reproduce.pkgutil, "resolve_name", lambda name: out_of_memory)
    assert reproduce.main(["--only=sinks", f"--workdir={tmp_path}"]) == 1
    assert (
        "error: RESOURCE_EXHAUSTED: Out of memory" in caplog.text and "failed: sinks" in caplog.text
    )


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


STOPPED = "stopped; start the same command again to continue\n"


def test_ctrl_c_is_one_line(run):
    code, text = run(interrupted)
    assert code == 130 and text.endswith(STOPPED) and "Traceback" not in text


def test_ctrl_c_stops_reproduce_with_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reproduce.pkgutil, "resolve_name", lambda name: interrupted)
    assert reproduce.main([f"--workdir={tmp_path}"]) == 130
    assert capsys.readouterr().err.endswith(STOPPED)


def test_an_empty_workdir_is_none_and_not_this_folder(monkeypatch, capsys):
    assert launched(monkeypatch, f"--config={CONFIGS['jepa']}", "--workdir=") == 2
    assert "both --config and --workdir are needed" in capsys.readouterr().err
