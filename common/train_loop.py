"""The one train loop."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from common.checkpoint import Checkpointer
from common.config import ConfigError
from common.data import check_fingerprint
from common.distributed import PreemptionGuard
from common.evaluation import EvaluationFailed, run_evals, unrecorded
from common.flops import utilisation
from common.ledger import Ledger
from common.mesh import auto_mesh, one_program_at_a_time
from common.metrics import Metrics, compute
from common.profiling import ProfileWindow, annotate
from common.recipe import EvalFn, Recipe
from common.sharding import moved_to
from common.state import TrainState, abstract_with_shardings, init_sharded, state_shardings
from common.train_spec import TrainSpec
from common.train_step import Program, diagnose
from common.writers import Writer

log = logging.getLogger("triptych")


class NonFiniteLoss(RuntimeError):
    """Training met a NaN or infinity. The state before that step has been saved."""


class Preempted(Exception):
    """The run was told to stop and has saved its state; start it again to continue."""


def train(
    recipe: Recipe,
    spec: TrainSpec,
    *,
    mesh: Mesh,
    batches: Callable[[int], Iterator[dict]],
    open_writer: Callable[[int], Writer],
    checkpointer: Checkpointer,
    workdir: Path,
    meta: Mapping[str, Any],
    evals: Mapping[str, EvalFn] | None = None,
    evaluate_again: bool = False,
    program: Program = Program(),
) -> tuple[Any, dict[str, float]]:
    """Trains to `spec.steps` and returns (final state, ledger seconds of all parts).

    Args:
      batches: from a start step to an endless iterator of device batches (already sharded), pytrees of `spec.batch` rows.
      open_writer: from the restored step (-1: none) to the writer of rows, which drops rows after that step.
      meta: JSON saved with every checkpoint. Its "data", if there (`data.fingerprint`), must be that of the checkpoint.
      evals: name -> function of the state, run every `eval_every` steps and at the end, with Auto axes. One that
        fails leaves "<name>_failed" in the rows; a restart runs those that metrics.jsonl lacks at its first step.
      evaluate_again: they measure something else than before, so a restart repeats those at its first step.
      program: how the step becomes a program: what is done with a batch in it, the compiler's options, what follows.

    Raises:
      NonFiniteLoss: the state of the last good step is saved, and the message says where it happened.
      Preempted: after SIGTERM; the state is saved.
      EvaluationFailed: at the end, with the state saved; a restart repeats what failed, and no training.
      ConfigError: the checkpoint was trained on other data, or for longer than `spec.steps`, or to a step between two
        dispatches.
      ValueError: a batch has not `spec.batch` rows.
    """
    loop = Loop(recipe, spec, mesh, batches, checkpointer, workdir, meta, evals or {}, program)
    loop.start(open_writer, evaluate_again)
    with contextlib.closing(loop.writer), _ended(loop.data), jax.set_mesh(mesh), loop.guard:
        # THE ORDER IS FIXED: save, eval, next batch, dispatch, write the previous step's metrics, hooks. A save comes
        # before the eval, which then sees what is saved and can lose nothing, and before the next batch, so that step
        # alone says where the data are.
        for step in range(loop.first, spec.steps, spec.steps_per_dispatch):
            loop.leave_if_told(step)
            if _due(step, spec.save_every) and step != loop.first:
                loop.save(step)
            if _due(step, spec.eval_every):
                loop.evaluate_and_go_on(step)
            metrics = loop.dispatch(step, loop.next_inputs(step))
            loop.write_previous()
            loop.keep_pace(step, metrics)
        loop.finish()
    return moved_to(loop.plain, loop.state), loop.ledger.seconds


@dataclass
class Loop:
    """A training under way: its state, the steps of the last dispatch that are not yet read, and all that they go to.

    `train` says in which order the methods are called, and what the arguments are.
    """

    recipe: Recipe
    spec: TrainSpec
    mesh: Mesh
    batches: Callable[[int], Iterator[dict]]
    checkpointer: Checkpointer
    workdir: Path
    meta: Mapping[str, Any]
    evals: Mapping[str, EvalFn]
    program: Program
    ledger: Ledger = field(default_factory=Ledger)
    guard: PreemptionGuard = field(default_factory=PreemptionGuard)
    profile: ProfileWindow | None = None
    in_a_second: dict[str, float] = field(default_factory=dict)  # the utilisation by steps of 1 s
    # first step of the dispatch, which of its steps, metrics of all, seconds a step
    pending: list[tuple[int, int, Metrics, float]] = field(default_factory=list)
    in_flight: list[Any] = field(default_factory=list)
    step_fn: Any = field(init=False)  # jitted, and compiled with the first dispatch
    state: TrainState = field(init=False)  # donated to every step: nothing else may hold it
    first: int = field(init=False)  # the step that this start begins with
    writer: Writer = field(init=False)
    data: Iterator[dict] = field(init=False)

    def start(self, open_writer: Callable[[int], Writer], evaluate_again: bool) -> None:
        """Restores or makes the state, and opens the writer and the data."""
        abstract, sharding = state_shardings(self.recipe, self.mesh)
        restored = self.checkpointer.restore(abstract_with_shardings(abstract, sharding))
        if restored is None:
            self.state = init_sharded(self.recipe, jax.random.key(self.spec.seed), sharding)
            self.first = 0
        else:
            self.state, saved_meta = restored
            self.first = int(self.state.step)
            self._check_restored(saved_meta)
            self.ledger.seconds |= saved_meta.get("seconds", {})  # of the parts before this one
            log.info("continuing from step %d", self.first)
        self.writer = open_writer(-1 if restored is None else self.first)
        every = restored is None or evaluate_again
        left = self.evals if every else unrecorded(self.evals, self.workdir, self.first)
        self.at_first = {name: fn for name, fn in self.evals.items() if name in left}
        self.step_fn = self.program.jit(self.recipe, self.spec.accumulate, self.mesh, sharding)
        if self.spec.profile_steps:
            begin = self.spec.profile_start
            self.profile = ProfileWindow(self.workdir, begin, begin + self.spec.profile_steps)
        self.most_in_flight = 0 if one_program_at_a_time(self.mesh) else 2
        self.plain = auto_mesh(self.mesh)  # for evaluations
        self.data = self.batches(self.first) if self.first < self.spec.steps else iter(())
        self.ledger.charge("start")
        self.timed_from = time.perf_counter(), self.first  # what the speed is counted from

    def _check_restored(self, saved: Mapping[str, Any]) -> None:
        try:
            check_fingerprint(saved.get("data", {}), self.meta.get("data", {}))
        except ValueError as error:
            raise ConfigError(f"{self.workdir}: {error}") from error
        self.spec.check_restored(self.first, self.workdir)

    def next_inputs(self, step: int) -> tuple[dict, ...]:
        """What the dispatch of this step and those after it takes. With the first one, it is compiled."""
        inputs = tuple(next(self.data) for _ in range(self.spec.steps_per_dispatch))
        for batch in inputs:
            self.spec.check_rows(batch)
        self.ledger.charge("input")
        if step == self.first:
            log.info("compiling the step (about a minute the first time) ...")
            before = self.ledger.seconds.get("compile", 0.0)
            traced = self.step_fn.trace(self.state, inputs, jnp.int32(step), self.program.prepare)
            self.step_fn = traced.lower().compile()
            devices, steps = list(self.mesh.devices.flat), self.spec.steps_per_dispatch
            self.in_a_second = utilisation(traced.jaxpr.jaxpr, devices, seconds=steps)
            self.program.after_compile()
            self.ledger.charge("compile")
            log.info("compiled in %.1f s", self.ledger.seconds["compile"] - before)
        return inputs

    def dispatch(self, step: int, inputs: tuple[dict, ...]) -> Metrics:
        now, prepare = jnp.int32(step), self.program.prepare
        with annotate(step):
            self.state, metrics = self.step_fn(self.state, inputs, now, prepare)
        return metrics

    def write_previous(self) -> None:
        """Reads and writes the pending steps' metrics; the only place where the host waits for the device."""
        while self.pending:
            first, i, metrics, seconds = self.pending.pop(0)
            step, values = first + i, compute(jax.tree.map(itemgetter(i), jax.device_get(metrics)))
            self.ledger.charge("step")
            if not all(map(math.isfinite, values.values())):
                self._stop_at_non_finite()
            if seconds:
                values |= {"images_per_second": self.spec.batch / seconds}
                values |= {name: part / seconds for name, part in self.in_a_second.items()}
            self.writer.write(step + 1, values)

    def keep_pace(self, step: int, metrics: Metrics) -> None:
        """Waits where too many dispatches are in flight, and notes the steps whose metrics are to be written."""
        self.in_flight.append(metrics["loss"].sum)
        if len(self.in_flight) > self.most_in_flight:
            jax.block_until_ready(self.in_flight.pop(0))
        self.ledger.charge("step")
        logged = [0] if self.spec.log_every and step % self.spec.log_every == 0 else []
        if step + (each := self.spec.steps_per_dispatch) == self.spec.steps:
            logged = sorted({*logged, each - 1})
        if logged:
            (began, since), now = self.timed_from, time.perf_counter()
            seconds = (now - began) / (step - since) if step > since else 0.0
            self.pending = [(step, i, metrics, seconds) for i in logged]
            self.timed_from = now, step
        if self.profile:
            self.profile(step, metrics)

    def settle(self, step: int) -> None:
        """Writes the rows so far and checks that the state took every step: called before the state is used."""
        self.write_previous()
        if int(self.state.step) != step:
            self._stop_at_non_finite()

    def evaluate(self, step: int) -> str:
        """Runs the evaluations and writes their row. Returns which failed, and why; "" if none."""
        todo = self.at_first if step == self.first else self.evals
        if not todo:
            return ""
        self.settle(step)
        with jax.set_mesh(self.plain):
            row, failed = run_evals(todo, moved_to(self.plain, self.state), step, self.workdir)
        if row:
            self.writer.write(step, row)
        self.ledger.charge("eval")
        return "; ".join(f"{name!r} at step {step} failed: {why}" for name, why in failed.items())

    def evaluate_and_go_on(self, step: int) -> None:
        """Evaluates between two steps, which the speed leaves out."""
        if failed := self.evaluate(step):
            log.error("evaluation %s; training goes on", failed)
        self.leave_if_told(step)
        self.timed_from = time.perf_counter(), step

    def save(self, step: int, wait: bool = False) -> None:
        self.settle(step)
        meta = {**self.meta, "seconds": dict(self.ledger.seconds)}
        self.checkpointer.save(step, self.state, meta, wait=wait)
        self.ledger.charge("save")

    def leave_if_told(self, step: int) -> None:
        """Saves and raises Preempted if a signal came."""
        if self.guard.reached(step):
            self.save(step, wait=True)
            raise Preempted(f"stopped by a signal at step {step}; the state is saved")

    def finish(self) -> None:
        """Saves and evaluates the last state."""
        last = self.spec.steps
        if self.profile:
            self.profile.close()
        if self.first < last:
            self.save(last, wait=True)
        self.leave_if_told(last)
        if failed := self.evaluate(last):
            raise EvaluationFailed(
                f"evaluation {failed}; the trained state is saved: fix that and start the same command again, "
                "which repeats only this"
            )
        self.leave_if_told(last)

    def _stop_at_non_finite(self) -> None:
        step = int(self.state.step)  # the guarded step froze the state at the first bad step
        with jax.set_mesh(self.plain):
            inputs = next(self.batches(step)), self.program.prepare
            state, (inputs, prepare) = moved_to(self.plain, (self.state, inputs))
            batch = jax.jit(lambda make, x: make(x))(prepare, inputs)
            where = diagnose(self.recipe, state, batch)
        meta = {**self.meta, "stopped": "non-finite loss"}
        self.checkpointer.save(step, self.state, meta, wait=True)
        raise NonFiniteLoss(
            f"step {step} is not finite, {where}. The state before it is saved as step {step}. Lower "
            "config.optim.lr, set config.optim.clip, or compute in float32 (config.policy.compute)."
        )


def _due(step: int, every: int) -> bool:
    return bool(every and step and step % every == 0)


@contextlib.contextmanager
def _ended(data: Iterator[dict]) -> Iterator[None]:
    """Ends the threads and processes that prepare batches, where there are some."""
    try:
        yield
    finally:
        if close := getattr(data, "close", None):
            close()
