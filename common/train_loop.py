"""The one train loop."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
from common.host import set_fragments_aside
from common.mesh import auto_mesh
from common.metrics import compute
from common.nn.cpu import compiler_options
from common.profiling import ProfileWindow, annotate
from common.recipe import EvalFn, Recipe
from common.sharding import BATCH_AXES, batch_sharding, batch_ways, moved_to, path_name, replicated
from common.state import abstract_with_shardings, init_sharded, state_shardings
from common.train_step import diagnose, make_train_step
from common.writers import Writer

log = logging.getLogger("triptych")


@dataclass(frozen=True)
class TrainSpec:
    """How long and how often.

    Attributes:
      steps: updates in all.  batch: global batch size.  seed: seed of parameters, data order, masks and noise.
      log_every: steps between rows of metrics; 0 for the last step alone.
      eval_every: steps between evaluations; 0 for the last step alone.
      save_every: steps between checkpoints; 0 for the last step alone.
      accumulate: microbatches per update.
      profile_start: first step traced into <workdir>/profile.  profile_steps: steps traced; 0 for none.
    """

    steps: int
    batch: int
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 500
    accumulate: int = 1
    profile_start: int = 10
    profile_steps: int = 0

    def __post_init__(self):
        if min(self.steps, self.batch, self.accumulate) < 1:
            raise ValueError("train.steps, train.batch and train.accumulate must be at least 1")
        hooks = ("log_every", "eval_every", "save_every", "profile_start", "profile_steps")
        if negative := [f"train.{n}={getattr(self, n)}" for n in hooks if getattr(self, n) < 0]:
            raise ValueError(f"{', '.join(negative)} must not be negative")
        if self.batch % self.accumulate:
            raise ValueError(
                f"train.batch={self.batch} does not divide into train.accumulate={self.accumulate} microbatches"
            )

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises ValueError unless every microbatch spreads evenly over the mesh."""
        shards = batch_ways(mesh)
        if (self.batch // self.accumulate) % shards:
            parts = f" in {self.accumulate} microbatches" if self.accumulate > 1 else ""
            axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH_AXES)
            raise ValueError(
                f"train.batch={self.batch}{parts} does not divide over the mesh's {axes}: use a multiple of "
                f"{shards * self.accumulate}"
            )


class NonFiniteLoss(RuntimeError):
    """Training met a NaN or infinity. The state before that step has been saved."""


class Preempted(Exception):
    """The run was told to stop and has saved its state; start it again to continue."""


@dataclass
class Ledger:
    """Wall seconds of a run, over all its parts that were saved, by what they went to."""

    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def charge(self, what: str) -> None:
        """Books the time since the last charge under `what`."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._since
        self._since = now


def _check_data(workdir: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    try:
        check_fingerprint(saved.get("data", {}), now.get("data", {}))
    except ValueError as error:
        raise ConfigError(f"{workdir}: {error}") from error


def _check_rows(batch: Any, rows: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if leaf.shape[:1] != (rows,):
            raise ValueError(
                f"batch[{path_name(path)!r}] has the shape {leaf.shape}, but train.batch={rows}: `batches` must give "
                "the whole global batch (common.data.prefetch_to_device joins it from every process's rows)"
            )


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
) -> tuple[Any, dict[str, float]]:
    """Trains to `spec.steps` and returns (final state, ledger seconds of all parts).

    Args:
      batches: from a start step to an endless iterator of device batches (already sharded), pytrees of `spec.batch` rows.
      open_writer: from the restored step (-1: none) to the writer of rows, which drops rows after that step.
      meta: JSON saved with every checkpoint. Its "data", if there (`data.fingerprint`), must be that of the checkpoint.
      evals: name -> function of the state, run every `eval_every` steps and at the end, with Auto axes. One that
        fails leaves "<name>_failed" in the rows; a restart runs those that metrics.jsonl lacks at its first step.
      evaluate_again: they measure something else than before, so a restart repeats those at its first step.

    Raises:
      NonFiniteLoss: the state of the last good step is saved, and the message says where it happened.
      Preempted: after SIGTERM; the state is saved.
      EvaluationFailed: at the end, with the state saved; a restart repeats what failed, and no training.
      ConfigError: the checkpoint was trained on other data, or for longer than `spec.steps`.
      ValueError: a batch has not `spec.batch` rows.
    """
    ledger = Ledger()
    plain = auto_mesh(mesh)
    abstract, sharding = state_shardings(recipe, mesh)
    restored = checkpointer.restore(abstract_with_shardings(abstract, sharding))
    if restored is None:
        state, start = init_sharded(recipe, jax.random.key(spec.seed), sharding), 0
    else:
        state, saved_meta = restored
        start = int(state.step)
        _check_data(workdir, saved_meta, meta)
        ledger.seconds |= saved_meta.get("seconds", {})  # of the parts before this one
        if start > spec.steps:
            raise ConfigError(
                f"{workdir} has trained {start} steps, more than train.steps={spec.steps}: raise it, or take another workdir"
            )
        log.info("continuing from step %d", start)
    writer = open_writer(-1 if restored is None else start)
    evals = evals or {}
    anew = restored is None or evaluate_again
    left = evals if anew else unrecorded(evals, workdir, start)  # at the first step

    step_fn = jax.jit(
        make_train_step(recipe, spec.accumulate),
        in_shardings=(sharding, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(sharding, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(),
    )
    profile = (
        ProfileWindow(workdir, spec.profile_start, spec.profile_start + spec.profile_steps)
        if spec.profile_steps
        else None
    )
    pending: tuple[int, dict, float] | None = None  # the last dispatched step, not yet read
    in_flight: list = []
    # Several virtual CPU devices share a thread pool, in which two steps' collectives can wait for each other for ever.
    most_in_flight = 0 if jax.default_backend() == "cpu" and mesh.size > 1 else 2
    data = batches(start) if start < spec.steps else iter(())
    ledger.charge("start")

    def flush() -> None:
        """Reads and writes the pending step's metrics; the only place where the host waits for the device."""
        nonlocal pending
        if pending is None:
            return
        step, metrics, seconds = pending
        pending = None
        values = compute(metrics)
        ledger.charge("step")
        if not all(map(math.isfinite, values.values())):
            _stop_at_non_finite(recipe, state, batches, checkpointer, meta)
        if seconds:
            values |= {"images_per_second": spec.batch / seconds}
        writer.write(step + 1, values)

    def settle(step: int) -> None:
        """Before the state is used: the rows so far, and the certainty that it did take every step."""
        flush()
        if int(state.step) != step:
            _stop_at_non_finite(recipe, state, batches, checkpointer, meta)

    def evaluate(step: int) -> str:
        todo = {name: fn for name, fn in evals.items() if step != start or name in left}
        if not todo:
            return ""
        settle(step)
        with jax.set_mesh(plain):
            row, failed = run_evals(todo, moved_to(plain, state), step, workdir)
        if row:
            writer.write(step, row)
        ledger.charge("eval")
        return "; ".join(f"{name!r} at step {step} failed: {why}" for name, why in failed.items())

    def save(step: int, wait: bool = False) -> None:
        settle(step)
        checkpointer.save(step, state, {**meta, "seconds": dict(ledger.seconds)}, wait=wait)
        ledger.charge("save")

    def leave_if_told(step: int) -> None:
        if guard.reached(step):
            save(step, wait=True)
            raise Preempted(f"stopped by a signal at step {step}; the state is saved")

    due = lambda step, every: every and step and step % every == 0  # noqa: E731
    mark, marked_step = time.perf_counter(), start
    with contextlib.closing(writer), _ended(data), jax.set_mesh(mesh), PreemptionGuard() as guard:
        # THE ORDER IS FIXED: save, eval, next batch, dispatch, write the previous step's metrics, hooks. A save comes
        # before the eval, which then sees what is saved and can lose nothing, and before the next batch, so that step
        # alone says where the data are.
        for step in range(start, spec.steps):
            leave_if_told(step)
            if due(step, spec.save_every) and step != start:
                save(step)
            if due(step, spec.eval_every):
                if failed := evaluate(step):
                    log.error("evaluation %s; training goes on", failed)
                leave_if_told(step)
                mark, marked_step = time.perf_counter(), step
            batch = next(data)
            _check_rows(batch, spec.batch)
            ledger.charge("input")
            if step == start:
                log.info("compiling the step (about a minute the first time) ...")
                before = ledger.seconds.get("compile", 0.0)
                step_fn = step_fn.lower(state, batch, jnp.int32(step)).compile()
                set_fragments_aside()
                ledger.charge("compile")
                log.info("compiled in %.1f s", ledger.seconds["compile"] - before)
            with annotate(step):
                state, metrics = step_fn(state, batch, jnp.int32(step))
            flush()
            in_flight.append(metrics["loss"].sum)
            if len(in_flight) > most_in_flight:
                jax.block_until_ready(in_flight.pop(0))
            ledger.charge("step")
            if (spec.log_every and step % spec.log_every == 0) or step + 1 == spec.steps:
                now = time.perf_counter()
                steps_since = step - marked_step
                pending = (step, metrics, (now - mark) / steps_since if steps_since else 0.0)
                mark, marked_step = now, step
            if profile:
                profile(step, metrics)
        if profile:
            profile.close()
        if start < spec.steps:
            save(spec.steps, wait=True)
        if start <= spec.steps:
            leave_if_told(spec.steps)
            if failed := evaluate(spec.steps):
                raise EvaluationFailed(
                    f"evaluation {failed}; the trained state is saved: mend that and start the same command again, "
                    "which repeats only this"
                )
            leave_if_told(spec.steps)
    return moved_to(plain, state), ledger.seconds


@contextlib.contextmanager
def _ended(data: Iterator[dict]) -> Iterator[None]:
    """Ends the threads and processes that prepare batches, where there are some."""
    try:
        yield
    finally:
        if close := getattr(data, "close", None):
            close()


def _stop_at_non_finite(recipe, state, batches, checkpointer, meta) -> None:
    step = int(state.step)  # the guarded step froze the state at the first bad step
    plain = auto_mesh(state.step.sharding.mesh)
    with jax.set_mesh(plain):
        where = diagnose(recipe, *moved_to(plain, (state, next(batches(step)))))
    checkpointer.save(step, state, {**meta, "stopped": "non-finite loss"}, wait=True)
    raise NonFiniteLoss(
        f"step {step} is not finite, {where}. The state before it is saved as step {step}. Lower "
        "config.optim.lr, set config.optim.clip, or compute in float32 (config.policy.compute)."
    )
