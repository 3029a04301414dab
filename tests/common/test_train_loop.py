"""The train loop: what is restored, in which order things happen, and what NaN and signals leave behind."""

import functools
import itertools
import os
import signal
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from common.checkpoint import Checkpointer, read_meta
from common.config import ConfigError
from common.evaluation import EvaluationFailed
from common.full_disk import NoSpaceError
from common.mesh import MeshSpec, make_mesh
from common.metrics import mean
from common.sharding import batch_sharding
from common.state import abstract_with_shardings, init_state, state_shardings
from common.train_loop import NonFiniteLoss, Preempted, TrainSpec, train
from common.train_step import diagnose, make_train_step
from common.writers import JsonlWriter, read_rows

BATCH, WIDTH = 8, 4


@dataclass(frozen=True)
class Line:
    """Least squares with dropout by the step's key, Adam, and an average of the weights as `extra`."""

    drop: float = 0.5

    def init(self, key):
        return {"w": jax.random.normal(key, (WIDTH,))}

    def init_extra(self, params):
        return {"average": jax.tree.map(jnp.copy, params)}

    def optimizer(self):
        return optax.adam(0.1)

    def loss(self, params, extra, batch, key):
        x = batch["x"]
        if self.drop:
            x = jnp.where(jax.random.bernoulli(key, self.drop, x.shape), x, 0)
        pull = ((params["w"] - extra["average"]["w"]) ** 2).sum()
        error = (x @ params["w"] - batch["y"]) ** 2
        return error.mean() + 0.1 * pull, {"loss": mean(error), "pull": mean(pull)}

    def update_extra(self, extra, params, step):
        m = step / (step + 1.0)
        blend = lambda a, p: m * a + (1 - m) * p  # noqa: E731
        return {"average": jax.tree.map(blend, extra["average"], params)}

    def param_axes(self, abstract):
        return jax.tree.map(lambda _: ("embed",), abstract)

    def extra_axes(self, abstract):
        return jax.tree.map(lambda _: ("embed",), abstract)

    def learned(self, opt_state):
        return {"steps_of_adam": opt_state[0].count}

    def schedules(self, step):
        return {"lr": 0.1 / (step + 1)}


class EndlessGradient(Line):
    """Its loss is finite everywhere and its gradient nowhere: d sqrt(w) / dw at 0, times 0."""

    def loss(self, params, extra, batch, key):
        value, metrics = super().loss(params, extra, batch, key)
        return value + jnp.sqrt(params["w"] * 0).sum(), metrics


MESH = make_mesh(MeshSpec(), jax.devices()[:2])


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Every run here compiles the same few programs."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """steps -> the final state of a run with no trouble."""
    return functools.cache(lambda steps: run(tmp_path_factory.mktemp("clean"), steps))


def host_batch(step, nan_at=()):
    rng = np.random.default_rng((7, step))
    x = rng.standard_normal((BATCH, WIDTH)).astype(np.float32)
    if step in nan_at:
        x[3, 1] = np.nan
    return {"x": x, "y": x @ np.arange(WIDTH, dtype=np.float32)}


def batches(start, nan_at=(), before=lambda step: None):
    """A pure function of the step, but for `before`, which is called with each step that is asked for."""
    for step in itertools.count(start):
        before(step)
        yield jax.device_put(host_batch(step, nan_at), batch_sharding(MESH))


def averaged(state):
    yield "average", jnp.linalg.norm(state.extra["average"]["w"])


def run(workdir, steps, *, recipe=Line(), data=batches, evals=None, meta=None, **spec):
    def open_writer(restored):
        writer = JsonlWriter(workdir / "metrics.jsonl")
        writer.resume_from(restored)
        return writer

    with Checkpointer(workdir / "checkpoints") as saver:
        state, _ = train(
            recipe,
            TrainSpec(steps=steps, batch=BATCH, **spec),
            mesh=MESH,
            batches=data,
            open_writer=open_writer,
            checkpointer=saver,
            workdir=workdir,
            meta=meta or {},
            evals={"eval": averaged} if evals is None else evals,
        )
    return state


def rows(workdir):
    clock = ("wall", "images_per_second")
    found = read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in clock} for row in found]


def saved(workdir, recipe=Line()):
    abstract = abstract_with_shardings(*state_shardings(recipe, MESH))
    with Checkpointer(workdir / "checkpoints") as saver:
        found = saver.restore(abstract)
    assert found is not None
    return found[0]


def assert_same_bits(a, b):
    bits = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert np.asarray(bits(x)).tobytes() == np.asarray(bits(y)).tobytes()


def signal_at(step):
    return lambda s: os.kill(os.getpid(), signal.SIGTERM) if s == step else None


class Crash(Exception):
    pass


def crash_at(step):
    def check(s):
        if s == step:
            raise Crash

    return check


EVERY = {
    "each step": {"log_every": 1, "eval_every": 3, "save_every": 2},
    "rarely": {"log_every": 4, "eval_every": 5, "save_every": 3},
    "never but last": {"log_every": 0, "eval_every": 0, "save_every": 0},
}


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
    assert found[1]["lr"] == 0.1 / 5, "row s + 1 holds the schedules of step s"
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


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_microbatches_equal_one_batch(accumulate):
    recipe = Line(drop=0.0)  # each microbatch has noise of its own
    state = init_state(recipe, jax.random.key(0))
    batch = host_batch(0)
    whole, whole_metrics = jax.jit(make_train_step(recipe))(state, batch, 0)
    parts, metrics = jax.jit(make_train_step(recipe, accumulate))(state, batch, 0)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-5)
    mu = lambda s: s.opt_state[0].mu["w"]  # noqa: E731
    np.testing.assert_allclose(mu(parts), mu(whole), rtol=1e-5)  # Adam hides the gradient's size
    for name in ("loss", "grad_norm"):
        value = lambda m, name=name: m[name].sum / m[name].weight  # noqa: E731
        np.testing.assert_allclose(value(metrics), value(whole_metrics), rtol=1e-5)


NAN = {
    "logged at each step": {"log_every": 1, "save_every": 0},
    "seen by a later row": {"log_every": 3, "save_every": 0},
    "seen by a save": {"log_every": 0, "save_every": 7},
    "seen by an evaluation": {"log_every": 0, "save_every": 0, "eval_every": 6},
    "seen at the end": {"log_every": 0, "save_every": 0},
}


@pytest.mark.parametrize("every", NAN.values(), ids=NAN)
def test_nan_keeps_the_state_before_it_however_late_it_is_noticed(tmp_path, uninterrupted, every):
    poisoned = lambda start: batches(start, nan_at=(5,))  # noqa: E731
    with pytest.raises(NonFiniteLoss, match=r"step 5 is not finite.*the batch: x, y") as caught:
        run(tmp_path, 10, data=poisoned, **every)
    assert "config.optim.lr" in str(caught.value)
    assert_same_bits(saved(tmp_path), uninterrupted(5))
    found = rows(tmp_path) if (tmp_path / "metrics.jsonl").exists() else []
    assert all(row["step"] <= 5 for row in found), "rows of the frozen state"


def test_a_run_stopped_by_nan_stops_there_again_and_goes_on_once_mended(tmp_path, uninterrupted):
    poisoned = lambda start: batches(start, nan_at=(5,))  # noqa: E731
    for _ in range(2):
        with pytest.raises(NonFiniteLoss, match="step 5"):
            run(tmp_path, 10, data=poisoned)
    assert_same_bits(run(tmp_path, 10), uninterrupted(10))


def test_nan_stops_a_run_before_it_can_replace_good_checkpoints(tmp_path):
    poisoned = lambda start: batches(start, nan_at=(4,))  # noqa: E731
    with pytest.raises(NonFiniteLoss):
        run(tmp_path, 10, data=poisoned, log_every=0, save_every=2)
    with Checkpointer(tmp_path / "checkpoints") as saver:
        assert saver.steps() == [2, 4]


def test_gradients_are_named_where_only_they_are_not_finite(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"step 0 .*first seen in gradients: w"):
        run(tmp_path, 3, recipe=EndlessGradient())
    assert int(saved(tmp_path).step) == 0


def test_diagnose_names_the_first_source():
    state = init_state(Line(), jax.random.key(0))
    good, nan = host_batch(0), jnp.full(WIDTH, jnp.nan)
    assert "not seen again" in diagnose(Line(), state, good)
    assert "parameters: w" in diagnose(Line(), state.replace(params={"w": nan}), good)
    extra = state.replace(extra={"average": {"w": nan}})
    assert "extra state: average/w" in diagnose(Line(), extra, good)
    huge = {"x": good["x"] * 1e30, "y": good["y"]}
    assert "loss terms: loss" in diagnose(Line(), state, huge)


def test_a_step_out_of_turn_changes_nothing_and_says_so():
    state = init_state(Line(), jax.random.key(0))
    after, metrics = jax.jit(make_train_step(Line()))(state, host_batch(0), 1)
    assert_same_bits(after, state)
    assert np.isnan(metrics["grad_norm"].sum)


@pytest.mark.parametrize(("batch", "accumulate", "multiple"), [(9, 1, 8), (12, 1, 8), (24, 6, 48)])
def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(batch, accumulate, multiple):
    mesh = make_mesh(MeshSpec(replica=2, fsdp=4))
    with pytest.raises(ValueError, match=f"train.batch={batch}.*multiple of {multiple}"):
        TrainSpec(steps=1, batch=batch, accumulate=accumulate).check_mesh(mesh)
    TrainSpec(steps=1, batch=multiple, accumulate=accumulate).check_mesh(mesh)
    tensor_only = make_mesh(MeshSpec(fsdp=1, tensor=8))
    TrainSpec(steps=1, batch=batch - batch % accumulate, accumulate=accumulate).check_mesh(
        tensor_only
    )


@pytest.mark.parametrize("name", ["log_every", "eval_every", "save_every", "profile_start"])
def test_a_negative_interval_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"train.{name}=-1"):
        TrainSpec(steps=1, batch=1, **{name: -1})


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch": 0}, {"accumulate": 0}, {"batch": 9}])
def test_sizes_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=r"at least 1|does not divide into train.accumulate=2"):
        TrainSpec(**{"steps": 1, "batch": 8, "accumulate": 2} | changes)


def test_compiling_is_announced_before_it_begins_and_timed_after(tmp_path, caplog):
    caplog.set_level("INFO", logger="triptych")
    run(tmp_path, 2)
    said = [m for m in caplog.messages if "compil" in m]
    assert len(said) == 2 and said[0].startswith("compiling the step") and said[1].endswith(" s")
