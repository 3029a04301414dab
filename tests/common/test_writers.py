"""The record of a run survives kills and restarts; logs stay readable; extras are optional."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import types

import jax
import pytest

from common import writers
from common.config import ConfigError
from common.writers import ConsoleWriter, JsonlWriter, MultiWriter, make_writer, read_metrics


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Recorder:
    def __init__(self, fail_on_close=False):
        self.rows, self.closed, self.fail = [], False, fail_on_close

    def write(self, step, scalars):
        self.rows.append((step, dict(scalars)))

    def close(self):
        self.closed = True
        if self.fail:
            raise OSError("disk full")


def train(path, steps):
    writer = JsonlWriter(path)
    for step in steps:
        writer.write(step, {"loss": 1 / (step + 1)})
    writer.close()


def curve(path):
    return [(row["step"], row["loss"]) for row in read_metrics(path)]


def test_rows_come_back_as_written_with_the_time(tmp_path):
    writer = JsonlWriter(tmp_path / "deep" / "metrics.jsonl")
    writer.write(3, {"loss": 0.25, "knn/top1": 0.5})
    (row,) = read_metrics(writer.path)  # readable before close
    wall = row.pop("wall")
    assert row == {"step": 3, "loss": 0.25, "knn/top1": 0.5}
    assert wall > 1.6e9
    writer.close()
    writer.close()


def test_a_full_disk_costs_no_rows_and_leaves_nothing(tmp_path, monkeypatch):
    train(tmp_path / "metrics.jsonl", range(4))

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        JsonlWriter(tmp_path / "metrics.jsonl").resume_from(1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert len(curve(tmp_path / "metrics.jsonl")) == 4


def test_non_finite_numbers_are_strict_json_and_come_back_as_floats(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(0, {"a": math.nan, "b": math.inf, "c": -math.inf})
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(writer.path.read_text(), parse_constant=refuse)
    (row,) = read_metrics(writer.path)
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


@pytest.mark.parametrize("killed_at, restored", [(9, 6), (9, 9), (3, 0), (5, -1)])
def test_a_resumed_curve_equals_an_uninterrupted_one(tmp_path, killed_at, restored):
    train(tmp_path / "whole.jsonl", range(13))
    path = tmp_path / "resumed.jsonl"
    train(path, range(killed_at + 1))
    with open(path, "a") as file:
        file.write('{"step": 10, "lo')  # SIGKILL in the middle of a line
    JsonlWriter(path).resume_from(restored)
    train(path, range(restored + 1, 13))
    assert curve(path) == curve(tmp_path / "whole.jsonl")


def test_appending_after_a_torn_line_does_not_glue_rows_together(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train(path, [0, 1])
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
    assert [step for step, _ in curve(path)] == [0, 1]
    train(path, [2])
    assert [step for step, _ in curve(path)] == [0, 1, 2]


def test_a_kill_during_truncation_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    train(path, range(5))

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonlWriter(path).resume_from(2)
    assert [step for step, _ in curve(path)] == [0, 1, 2, 3, 4]


def test_every_row_before_sigkill_is_on_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = (
        "import os, signal; from common.writers import JsonlWriter\n"
        f"w = JsonlWriter({str(path)!r})\n"
        "for s in range(3): w.write(s, {'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == -signal.SIGKILL
    assert [step for step, _ in curve(path)] == [0, 1, 2]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\noops\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 .*oops"):
        read_metrics(path)


def test_a_bucket_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="local path"):
        JsonlWriter("gs://bucket/run/metrics.jsonl")


def test_a_log_file_gets_plain_lines_with_progress_rate_and_time_left(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(writers.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    writer = ConsoleWriter(200, items_per_step=64, unit="images", every=0, stream=stream)
    for step in (10, 20, 30):
        writer.write(step, {"loss": 0.5, "lr": 1e-3})
    writer.write(30, {"knn/top1": 0.25})
    writer.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 10/200  5%  loss 0.5"
    assert lines[2] == "step 30/200  15%  loss 0.5  640 images/s  17s left"
    assert lines[3] == "step 30  knn/top1 0.25"
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_a_log_file_is_not_flooded_but_gets_the_last_step(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(writers.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    writer = ConsoleWriter(95, every=30, stream=stream)
    for step in range(96):
        writer.write(step, {"loss": 1.0})
    steps = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert steps == [0, 30, 60, 90, 95]


def test_a_terminal_gets_a_bar_with_the_same_numbers(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    writer = ConsoleWriter(200, stream=stream)
    writer.write(50, {"loss": 0.5})
    writer.write(100, {"loss": 0.25})
    writer.write(100, {"knn/top1": 0.125})
    writer.close()
    text = stream.getvalue()
    assert "50%" in text and "100/200" in text and "loss 0.25" in text and "steps/s" in text
    assert "step 100  knn/top1 0.125" in text


def test_a_bar_waits_for_the_first_row(monkeypatch):
    """Until then lines are logged, which it would tear."""
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    writer = ConsoleWriter(200, stream=stream)
    assert stream.getvalue() == ""
    writer.close()
    assert "%" not in stream.getvalue()


def test_a_dumb_terminal_gets_no_control_codes(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    ConsoleWriter(10, stream=stream).write(1, {"loss": 1.0})
    assert stream.getvalue() == "step 1/10  10%  loss 1\n"


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0s"), (59.6, "1m00s"), (75, "1m15s"), (7300, "2h01m"), (-3, "0s")]
)
def test_durations_read_well(seconds, text):
    assert writers._duration(seconds) == text


@pytest.mark.parametrize(
    "module, make",
    [
        ("tensorboardX", lambda: writers.TensorBoardWriter("logs")),
        ("wandb", lambda: writers.WandbWriter("project", "run")),
    ],
)
def test_a_missing_extra_says_how_to_get_it(monkeypatch, module, make):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}: pip install 'triptych\["):
        make()


@pytest.fixture
def fake_wandb(monkeypatch):
    """What W&B is asked for."""
    calls = []
    run = types.SimpleNamespace(
        define_metric=lambda *a, **k: calls.append(("define", a, k)),
        log=lambda data: calls.append(("log", data)),
        finish=lambda: calls.append(("finish",)),
    )
    fake = types.ModuleType("wandb")
    fake.Error = type("Error", (Exception,), {})
    fake.init = lambda **kwargs: calls.append(("init", kwargs)) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return calls


def test_wandb_may_log_a_resumed_step_again(fake_wandb):
    writer = writers.WandbWriter("project", "run", config={"lr": 1.0}, dir="here")
    writer.write(5, {"loss": 1.0})
    writer.close()
    assert fake_wandb[0][1] == dict(
        project="project", id="run", config={"lr": 1.0}, resume="allow", allow_val_change=True,
        dir="here",
    )  # fmt: skip
    assert fake_wandb[1:] == [
        ("define", ("*",), {"step_metric": "step"}),
        ("log", {"step": 5, "loss": 1.0}),
        ("finish",),
    ]


def test_wandb_without_a_login_is_a_plain_error(tmp_path, fake_wandb, monkeypatch):
    def init(**kwargs):
        raise sys.modules["wandb"].Error("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(ConfigError, match=r"No API key configured.*WANDB_MODE=offline"):
        make_writer(tmp_path, 10, wandb={"project": "mine"})


def test_a_workdir_is_one_run_of_wandb_and_no_other_is(tmp_path, fake_wandb):
    for workdir in ("a/cifar10", "b/cifar10", "a/cifar10"):
        settings = {"project": "mine", "config": {"lr": 1.0}}
        make_writer(tmp_path / workdir, 10, restored_step=3, wandb=settings).close()
    made = [call[1] for call in fake_wandb if call[0] == "init"]
    first, other, resumed = (kwargs["id"] for kwargs in made)
    assert first == resumed != other and first.isalnum() and len(first) >= 8
    assert {kwargs["name"] for kwargs in made} == {"cifar10"}
    assert all(kwargs["config"] == {"lr": 1.0} and kwargs["project"] == "mine" for kwargs in made)


def events(folder):
    """The events of a folder of TensorBoard, in the order in which it reads them."""
    pytest.importorskip("tensorboardX", reason="extra `tensorboard` is not installed")
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_tensorboard_events_can_be_read_back(tmp_path):
    pytest.importorskip("tensorboardX", reason="extra `tensorboard` is not installed")
    writer = writers.TensorBoardWriter(tmp_path)
    writer.write(7, {"loss": 0.5, "bad": math.nan})
    writer.close()
    values = {(e.step, v.tag): v.simple_value for e in events(tmp_path) for v in e.summary.value}
    assert values[7, "loss"] == 0.5 and math.isnan(values[7, "bad"])


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    pytest.importorskip("tensorboardX", reason="extra `tensorboard` is not installed")
    for restored, steps in ((-1, range(1, 21)), (10, range(11, 16)), (12, range(13, 31))):
        writer = make_writer(tmp_path, 30, restored_step=restored, tensorboard=True)
        for step in steps:
            writer.write(step, {"loss": float(restored)})
        writer.close()
    shown = {}
    for event in events(tmp_path / "tensorboard"):
        if event.session_log.status == event.session_log.START:  # what TensorBoard does with it
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            assert event.step not in shown, "a step twice"
            shown[event.step] = value.simple_value
    assert list(shown) == list(range(1, 31))
    assert [shown[step] for step in (10, 11, 12, 13, 30)] == [-1, 10, 10, 12, 12]


def test_all_writers_get_every_row_and_are_closed_even_if_one_fails():
    writers = [Recorder(), Recorder(fail_on_close=True), Recorder()]
    together = MultiWriter(*writers)
    together.write(1, {"loss": 2.0})
    with pytest.raises(OSError, match="disk full"):
        together.close()
    for writer in writers:
        assert writer.rows == [(1, {"loss": 2.0})] and writer.closed


def test_make_writer_continues_the_curve_of_the_restored_step(tmp_path, capsys):
    train(tmp_path / "metrics.jsonl", range(6))
    writer = make_writer(tmp_path, 10, restored_step=3)
    writer.write(4, {"loss": 7.0})
    writer.close()
    assert [step for step, _ in curve(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert "step 4/10" in capsys.readouterr().out


def test_only_process_0_touches_the_files(tmp_path, monkeypatch, capsys):
    train(tmp_path / "metrics.jsonl", range(6))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = make_writer(tmp_path, 10, restored_step=3)
    writer.write(4, {"loss": 7.0})
    writer.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6
    assert capsys.readouterr().out == ""
