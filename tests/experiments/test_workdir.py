"""What the launcher does where a workdir cannot be used, a disk is full, or an evaluation fails: one line, an exit code."""

import json
import os
import signal
from types import SimpleNamespace

import pytest

from common import plots
from common.workdir import hold
from experiments.jepa import pretrain as jepa_pretrain
from tests.experiments import test_launch_errors as launching

start, refusal, SMOKE = launching.start, launching.refusal, launching.SMOKE
FULL = OSError(28, "No space left on device")


def raising(error):
    def function(*_, **__):
        raise error

    return function


def begun(workdir):
    (workdir / "metrics.jsonl").write_text('{"step": 1, "wall": 1.0, "loss": 2.0}\n')


def test_a_workdir_in_use_is_refused_and_left_alone(refusal, tmp_path):
    with hold(tmp_path / "run") as workdir:
        begun(workdir)
        before = {path: path.read_bytes() for path in workdir.iterdir()}
        text = refusal(SMOKE, train=raising(AssertionError("it began")))
        assert f"process {os.getpid()} on " in text and "name another folder" in text
        assert {path: path.read_bytes() for path in workdir.iterdir()} == before


def test_a_workdir_that_is_a_file_is_refused(refusal, tmp_path):
    (tmp_path / "notes").write_text("")
    assert "notes is not a folder" in refusal(SMOKE, workdir=tmp_path / "notes")
    assert "notes is not a folder" in refusal(SMOKE, workdir=tmp_path / "notes" / "run")


def test_a_bucket_is_refused_before_anything_is_made(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = f"--config={os.path.join(os.path.dirname(jepa_pretrain.__file__), 'configs/jepa/scenes.py')}:smoke"
    assert "not a path of a file system" in refusal(config, workdir="gs://bucket/run")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_setting_leaves_no_workdir(refusal, tmp_path):
    refusal(SMOKE, "--config.checkpoint.keep=0")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_though_the_picture_fails_too(start, tmp_path, monkeypatch, caplog):
    def train(*_, workdir, **__):
        begun(workdir)
        raise FULL

    monkeypatch.setattr(plots, "curves", raising(FULL))
    code, text = start(SMOKE, train=train)
    assert code == 1
    assert text.startswith(f"error: no space left on {tmp_path}/run") and text.count("\n") == 1
    assert "is not drawn" not in caplog.text


def test_a_picture_that_fails_hides_nothing_and_stops_nothing(start, monkeypatch, caplog):
    def train(*_, workdir, **__):
        begun(workdir)
        raise KeyError("the cause")

    monkeypatch.setattr(plots, "curves", raising(ValueError("no font")))
    with pytest.raises(KeyError, match="the cause"):
        start(SMOKE, train=train)
    assert "curves.png is not drawn: no font" in caplog.text


def test_probes_that_fail_are_a_failure_that_the_same_command_mends(
    start, tmp_path, monkeypatch, caplog
):
    def train(*_, workdir, **__):
        begun(workdir)
        return SimpleNamespace(extra={"target": {}}), {}

    monkeypatch.setattr(plots, "curves", lambda rows, path: path.touch())
    monkeypatch.setattr(jepa_pretrain, "linear_probes", raising(ValueError("labels of -1")))
    code, _ = start(SMOKE, train=train)
    assert code == 1 and not (tmp_path / "run" / "result.json").exists()
    (line,) = [r.getMessage() for r in caplog.records if "failed" in r.getMessage()]
    assert "linear probes failed: ValueError: labels of -1" in line and "same command" in line
    assert (tmp_path / "run" / "curves.png").exists()

    told = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr(jepa_pretrain, "linear_probes", told)
    code, _ = start(SMOKE, train=train)
    assert code == 75 and not (tmp_path / "run" / "result.json").exists()

    monkeypatch.setattr(jepa_pretrain, "linear_probes", lambda *_, **__: {"linear_label": 0.5})
    code, _ = start(SMOKE, train=train)
    assert code == 0
    assert (
        json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["linear_label"] == 0.5
    )
