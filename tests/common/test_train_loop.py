"""The train loop: what is restored, in which order things happen, and what signals and failures leave behind."""

import os
import signal

import jax
import pytest

from common.checkpoint import Checkpointer, read_meta
from common.config import ConfigError
from common.evaluation import EvaluationFailed
from common.full_disk import NoSpaceError
from common.train_loop import Preempted, TrainSpec, train
from common.train_step import Program
from common.writers import JsonlWriter
from tests.common.line import (
    BATCH,
    EVERY,
    MESH,
    Crash,
    Line,
    assert_same_bits,
    averaged,
    batches,
    crash_at,
    rows,
    run,
    saved,
    signal_at,
)

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_the_seconds_of_every_part_are_summed_and_a_longer_run_is_none_of_fewer_steps(tmp_path):
    run(tmp_path, 2)
    before = read_meta(tmp_path / "checkpoints")["seconds"]
    run(tmp_path, 4)
    after = read_meta(tmp_path / "checkpoints")["seconds"]
    assert before.keys() == after.keys() >= {"start", "input", "compile", "step"}
    assert all(after[name] > seconds for name, seconds in before.items())
    with pytest.raises(ConfigError, match=r"trained 4 steps, more than train\.steps=2"):
        run(tmp_path, 2)
    assert rows(tmp_path)[-1]["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
def test_a_run_that_was_stopped_twice_equals_one_that_was_not(tmp_path, every):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    want = run(whole, 12, **every)
    with pytest.raises(Preempted, match="step 6"):
        run(broken, 12, data=lambda start: batches(start, before=signal_at(5)), **every)
    with pytest.raises(Crash):  # some way behind the last checkpoint
        run(broken, 12, data=lambda start: batches(start, before=crash_at(11)), **every)
    if every["log_every"] == 1:
        assert rows(broken)[-1]["step"] > 9, "the crash should leave rows to be replaced"
    got = run(broken, 12, **every)
    assert_same_bits(got, want)
    assert rows(broken) == rows(whole)


def test_a_signal_inside_an_evaluation_saves_the_state_that_was_evaluated(tmp_path):
    def evaluate(state):
        os.kill(os.getpid(), signal.SIGTERM)
        yield "step", int(state.step)

    with pytest.raises(Preempted, match="step 3; the state is saved"):
        run(tmp_path, 9, eval_every=3, save_every=0, evals={"eval": evaluate})
    assert int(saved(tmp_path).step) == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers are put back"


class Spy(Checkpointer):
    """Notes each save in `events`."""

    def __init__(self, directory, events):
        super().__init__(directory)
        self.events = events

    def save(self, step, state, meta, *, wait=False):
        assert int(state.step) == step
        self.events.append(("save", step))
        super().save(step, state, meta, wait=wait)


class Notes:
    """A writer that notes each row in `events`."""

    def __init__(self, events):
        self.events = events

    def write(self, step, scalars):
        self.events.append(("eval row" if "eval/average" in scalars else "row", step))

    def close(self):
        self.events.append(("close", None))


def test_the_order_is_save_eval_batch_and_the_row_of_the_step_before(tmp_path):
    events = []
    note = lambda what: lambda step: events.append((what, step))  # noqa: E731

    def evaluate(state):
        events.append(("eval", int(state.step)))
        yield from averaged(state)

    with Spy(tmp_path, events) as saver:
        train(
            Line(),
            TrainSpec(steps=5, batch=BATCH, log_every=1, eval_every=2, save_every=2),
            mesh=MESH,
            batches=lambda start: batches(start, before=note("batch")),
            open_writer=lambda restored: Notes(events),
            checkpointer=saver,
            workdir=tmp_path,
            meta={},
            evals={"eval": evaluate},
        )
    assert events == [
        ("batch", 0),
        ("batch", 1), ("row", 1),
        ("row", 2), ("save", 2), ("eval", 2), ("eval row", 2), ("batch", 2),
        ("batch", 3), ("row", 3),
        ("row", 4), ("save", 4), ("eval", 4), ("eval row", 4), ("batch", 4),
        ("row", 5), ("save", 5), ("eval", 5), ("eval row", 5), ("close", None),
    ]  # fmt: skip


def failing_at(*steps, error=ValueError("k=20 must lie in 1..12\nand more")):
    """`averaged`, but for these steps; counts its calls in `.seen`."""

    def evaluate(state):
        evaluate.seen.append(int(state.step))
        if int(state.step) in steps:
            raise error
        yield from averaged(state)

    evaluate.seen = []
    return evaluate


def kinds(workdir):
    """(step, what) of each row."""
    return [(row["step"], "loss" if "loss" in row else "eval") for row in rows(workdir)]


def test_an_evaluation_that_fails_is_told_in_a_line_and_training_goes_on(
    tmp_path, caplog, uninterrupted
):
    evals = {"eval": failing_at(2), "other": averaged}
    got = run(tmp_path, 6, evals=evals, eval_every=2, save_every=2)
    assert_same_bits(got, uninterrupted(6))
    assert [row for row in rows(tmp_path) if row["step"] == 2][-1].keys() == {
        "step", "eval_failed", "other/average",
    }  # fmt: skip
    assert [row["step"] for row in rows(tmp_path) if "eval/average" in row] == [4, 6]
    (line,) = [r.getMessage() for r in caplog.records if "failed" in r.getMessage()]
    assert "\n" not in line and "'eval' at step 2" in line and "k=20 must lie in 1..12" in line
    assert "training goes on" in line
    assert "raise error" in (tmp_path / "evaluation_errors.txt").read_text(), "the traceback"


def test_a_final_evaluation_that_fails_loses_nothing_and_is_all_that_a_restart_does(
    tmp_path, uninterrupted
):
    want = uninterrupted(5)
    evals = {"eval": failing_at(5), "other": averaged}
    with pytest.raises(EvaluationFailed, match=r"'eval' at step 5 .*k=20 must.*same command") as e:
        run(tmp_path, 5, evals=evals, save_every=0)
    assert "\n" not in str(e.value)
    assert_same_bits(saved(tmp_path), want)
    assert rows(tmp_path)[-1].keys() == {"step", "eval_failed", "other/average"}

    no_batch = lambda start: batches(start, before=crash_at(start))  # noqa: E731
    with pytest.raises(EvaluationFailed):  # it is tried again, and may fail again
        run(tmp_path, 5, evals=evals, data=no_batch)
    mended = {"eval": failing_at(), "other": failing_at(5)}
    assert_same_bits(run(tmp_path, 5, evals=mended, data=no_batch), want)
    assert rows(tmp_path)[-1].keys() == {"step", "eval/average"}
    run(tmp_path, 5, evals=mended, data=no_batch)
    assert (mended["eval"].seen, mended["other"].seen) == ([5], []), "what is done is not repeated"


@pytest.mark.parametrize(("every", "step"), [(0, 6), (3, 3)], ids=["at the end", "on the way"])
def test_a_run_that_dies_in_an_evaluation_begins_with_it_again(tmp_path, every, step):
    spec = {"log_every": 0, "eval_every": every, "save_every": every}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 6, evals={"eval": failing_at(step, error=KeyboardInterrupt())}, **spec)
    assert int(saved(tmp_path).step) == step, "saved before it is evaluated"
    run(tmp_path, 6, **spec)
    on_the_way = [(step, "eval")] if every else []
    assert kinds(tmp_path) == [*on_the_way, (6, "loss"), (6, "eval")]


def test_a_signal_where_an_evaluation_is_due_saves_and_leaves_at_once(tmp_path):
    never = failing_at()
    with pytest.raises(Preempted, match="step 3"):
        run(
            tmp_path, 6, data=lambda s: batches(s, before=signal_at(2)), evals={"eval": never},
            eval_every=3,
        )  # fmt: skip
    assert never.seen == []
    run(tmp_path, 5, eval_every=3, log_every=0)
    assert kinds(tmp_path)[-3:] == [(3, "eval"), (5, "loss"), (5, "eval")], "the next start does"


def test_a_signal_inside_the_final_evaluation_keeps_it_and_leaves(tmp_path):
    def evaluate(state):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from averaged(state)

    with pytest.raises(Preempted, match="step 3"):
        run(tmp_path, 3, evals={"eval": evaluate})
    never = failing_at()
    run(tmp_path, 3, evals={"eval": never})
    assert never.seen == [] and "eval/average" in rows(tmp_path)[-1]


def test_a_disk_that_is_full_when_a_row_is_written_costs_what_was_not_saved(tmp_path, monkeypatch):
    def write(writer, step, scalars):
        if step == 5:
            raise OSError(28, "No space left on device")
        whole(writer, step, scalars)

    every = {"log_every": 1, "save_every": 2}
    whole = JsonlWriter.write
    with monkeypatch.context() as patch, pytest.raises(NoSpaceError, match="checkpoint is step 4"):
        patch.setattr(JsonlWriter, "write", write)
        run(tmp_path, 6, **every)
    run(tmp_path, 6, **every)
    assert kinds(tmp_path) == [*((step, "loss") for step in range(1, 7)), (6, "eval")]


def test_the_last_step_is_logged_evaluated_and_saved_whatever_the_intervals(tmp_path):
    run(tmp_path, 6, log_every=4, eval_every=0, save_every=4)
    found = rows(tmp_path)
    assert [(row["step"], "loss" in row) for row in found] == [
        (1, True), (5, True), (6, True), (6, False),
    ]  # fmt: skip
    assert found[-1].keys() == {"step", "eval/average"}
    assert found[1]["lr"] == pytest.approx(0.1 / 5, rel=1e-6), (
        "row s + 1 holds the schedules of step s"
    )
    assert [row["steps_of_adam"] for row in found[:3]] == [1, 5, 6], (
        "what the optimizer sets itself"
    )
    with Checkpointer(tmp_path / "checkpoints") as saver:
        assert saver.steps() == [4, 6]


def test_a_finished_run_started_again_does_nothing(tmp_path):
    first = run(tmp_path, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = run(tmp_path, 3, data=lambda start: batches(start, before=crash_at(start)))
    assert_same_bits(again, first)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_longer_run_continues_a_finished_one(tmp_path, uninterrupted):
    run(tmp_path, 3)
    assert_same_bits(run(tmp_path, 5), uninterrupted(5))


def test_a_program_gets_its_options_and_its_hook_follows_the_compilation_once(tmp_path):
    calls, path = [], tmp_path / "metrics.jsonl"
    run(tmp_path, 2, program=Program(after_compile=lambda: calls.append(path.exists())))
    assert calls == [False], "once, before the first row"
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        run(tmp_path / "other", 2, program=Program(compiler_options={"no_such_option": "1"}))
