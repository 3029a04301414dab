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
from common.host import set_fragments_aside
from common.mesh import auto_mesh
from common.metrics import compute
from common.nn.cpu import compiler_options
from common.profiling import ProfileWindow, annotate
from common.recipe import EvalFn, Recipe
from common.sharding import BATCH_AXES, batch_sharding, batch_ways, moved_to, replicated
from common.state import abstract_with_shardings, init_sharded, state_shardings
from common.train_step import diagnose, make_train_step
from common.writers import Writer

log = logging.getLogger("triptych")


@dataclass(frozen=True)
class TrainSpec:
    """How long and how often.

    Attributes:
      steps: updates in all.  batch: global batch size.  seed: of parameters, data order, masks and noise.
      log_every, eval_every, save_every: in steps; 0 turns it off. The last step is always logged, evaluated and saved.
      accumulate: microbatches per update.
      profile_start, profile_steps: window traced into <workdir>/profile; 0 steps for none.
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
    """Wall seconds of this run by what they went to."""

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
) -> tuple[Any, dict[str, float]]:
    """Trains to `spec.steps` and returns (final state, ledger seconds).

    Args:
      batches: from a start step to an endless iterator of device batches (already sharded).
      open_writer: from the restored step (-1: none) to the writer of rows, which drops rows after that step.
      meta: JSON saved with every checkpoint. Its "data", if there (`data.fingerprint`), must be that of the checkpoint.
      evals: name -> function of the state, run every `eval_every` steps and at the end, with Auto axes.

    Raises:
      NonFiniteLoss: the state of the last good step is saved, and the message says where it happened.
      Preempted: after SIGTERM; the state is saved.
      ConfigError: the checkpoint was trained on other data.
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
        log.info("continuing from step %d", start)
    writer = open_writer(-1 if restored is None else start)

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
        row = values | recipe.schedules(step)
        if seconds:
            row |= {"images_per_second": spec.batch / seconds}
        writer.write(step + 1, row)

    def settle(step: int) -> None:
        """Before the state is used: the rows so far, and the certainty that it did take every step."""
        flush()
        if int(state.step) != step:
            _stop_at_non_finite(recipe, state, batches, checkpointer, meta)

    def evaluate(step: int) -> None:
        settle(step)
        results = {}
        with jax.set_mesh(plain):
            seen = moved_to(plain, state)
            for name, fn in (evals or {}).items():
                results |= {f"{name}/{k}": float(v) for k, v in fn(seen)}
        if results:
            writer.write(step, results)
        ledger.charge("eval")

    def save(step: int, wait: bool = False) -> None:
        settle(step)
        checkpointer.save(step, state, {**meta, "seconds": dict(ledger.seconds)}, wait=wait)
        ledger.charge("save")

    due = lambda step, every: every and step % every == 0 and step != start  # noqa: E731
    mark, marked_step = time.perf_counter(), start
    with contextlib.closing(writer), jax.set_mesh(mesh), PreemptionGuard() as guard:
        # THE ORDER IS FIXED: eval, save, next batch, dispatch, write the previous step's metrics, hooks. Evals see
        # the state that is saved; a save comes before the next batch, so that step alone says where the data are.
        for step in range(start, spec.steps):
            if due(step, spec.eval_every):
                evaluate(step)
                mark, marked_step = time.perf_counter(), step
            stop = guard.reached(step)
            if stop or due(step, spec.save_every):
                save(step, wait=stop)
            if stop:
                raise Preempted(f"stopped by a signal at step {step}; the state is saved")
            batch = next(data)
            ledger.charge("input")
            if step == start:
                log.info("compiling the step (about a minute the first time) ...")
                step_fn = step_fn.lower(state, batch, jnp.int32(step)).compile()
                set_fragments_aside()
                ledger.charge("compile")
                log.info("compiled in %.1f s", ledger.seconds["compile"])
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
            evaluate(spec.steps)
            save(spec.steps, wait=True)
    return moved_to(plain, state), ledger.seconds


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
