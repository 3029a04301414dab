"""Grids of small trainings: one method from many initial rates and seeds, as one jitted program.

Every cell of the grid is a training run of its own, on the same batches as the other rates of its seed. `vmap` runs the
cells of a small task side by side; those of a large one take turns, step by step. State is saved as it goes: a grid that was
stopped continues; a signal (common.distributed.PreemptionGuard) stops it, saved, at the end of an epoch.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

from common.checkpoint import Checkpointer
from common.config import check_choices
from common.distributed import PreemptionGuard
from common.progress import draws_bars
from common.results import ResultRow
from common.train_loop import Preempted
from common.writers import JsonlWriter
from metaopt import learned

log = logging.getLogger("triptych")


@dataclass(frozen=True)
class Task:
    """A supervised problem that fits in memory.

    Attributes:
      init: key -> params.  loss: (params, batch, key) -> scalar.  score: params -> test scores, the lower the better; the
        first one is the task's own ("error", "perplexity").  train: arrays [N, ...].
      side_by_side: whether cells run under `vmap`. Convolutions, each with a kernel of its own, are slow so.
    """

    name: str
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, dict, jax.Array], jax.Array]
    score: Callable[[Any], dict[str, jax.Array]]
    train: dict[str, np.ndarray]
    side_by_side: bool = True

    def steps(self, batch: int) -> int:
        """Steps of an epoch. Raises ValueError if the training set is smaller than a batch."""
        n = len(next(iter(self.train.values())))
        if n < batch:
            raise ValueError(f"batch={batch} is larger than the training set of {self.name}, {n}")
        return n // batch


@dataclass(frozen=True)
class Method:
    """An optimizer as a function of its initial rate.

    Attributes:
      make: rate -> transformation.
      in_state: whether all that depends on the rate is in the state that `init` makes, as it is for all that metaopt
        learns. Otherwise the transformation is rebuilt around a traced rate.
      evaluated: (opt_state, params) -> the parameters to test, where those are not the trained ones.
      schedule: part of the run in [0, 1) -> factor of the rate, which `make` is then given as an optax schedule (and
        `in_state` is False).
    """

    name: str
    make: Callable[[Any], optax.GradientTransformation]
    in_state: bool = True
    evaluated: Callable[[Any, Any], Any] = lambda state, params: params
    schedule: Callable[[jax.Array], jax.Array] | None = None


@dataclass(frozen=True)
class GridSpec:
    """Which runs there are, and how long they are.

    Attributes:
      epochs: passes of every run over the training data, at most.  batch: examples of an update.
      rates: initial learning rates.  seeds: seeds of parameters and data order.
      save_every: epochs between checkpoints.
    """

    epochs: int
    batch: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    save_every: int = 5

    def __post_init__(self):
        if min(self.epochs, self.batch, self.save_every) < 1:
            raise ValueError(
                f"epochs={self.epochs}, batch={self.batch}, save_every={self.save_every}: at least 1"
            )
        check_choices(rates=self.rates, seeds=self.seeds)
        if min(self.rates) <= 0:
            raise ValueError(f"rates={self.rates} must be positive")


@dataclass(frozen=True)
class Cell:
    """How one run ended: test scores, mean training loss of the last epoch, learned values.

    finite: whether parameters, training loss and scores all are.
    """

    rate: float
    seed: int
    scores: dict[str, float]
    train_loss: float
    learned: dict[str, float]
    finite: bool


def run_grid(task: Task, method: Method, spec: GridSpec, workdir: Path) -> list[Cell]:
    """Trains every (seed, rate) and returns the cells in that order; rows per epoch go to `workdir`/metrics.jsonl.

    Raises:
      Preempted: after SIGTERM, at the end of the epoch; the state is saved.
    """
    grid = _Grid(task, method, spec)
    measure = jax.jit(grid.measure)
    abstract = jax.eval_shape(jax.vmap(grid.init_seed), grid.keys)
    measured = jax.eval_shape(measure, abstract, grid.no_losses())
    log.info(
        "%s, %s: %d runs of %d epochs of %d steps; compiling ...",
        task.name, method.name, grid.no_losses().size, spec.epochs, grid.steps,
    )  # fmt: skip
    writer = JsonlWriter(workdir / "metrics.jsonl")
    with (
        closing(writer),
        Checkpointer(workdir / "checkpoints") as saver,
        Progress(transient=True, disable=not draws_bars()) as bar,
        PreemptionGuard() as guard,
    ):
        restored = saver.restore(_placed({"state": abstract, "last": measured}))
        state, last, start = jax.jit(jax.vmap(grid.init_seed))(grid.keys), None, 0
        if restored is not None:
            (state, last), start = (restored[0]["state"], restored[0]["last"]), restored[1]["epoch"]
            log.info("%s: continuing from epoch %d", method.name, start)
        writer.resume_from(start if restored else -1)
        epochs = _epochs(grid, state, start, bar)
        for number, (state, losses) in enumerate(epochs, start + 1):
            last = jax.block_until_ready(measure(state, losses))
            writer.write(number, _row(spec, last))
            stop = guard.reached(number)
            if stop or number % spec.save_every == 0 or number == spec.epochs:
                _save(saver, number, {"state": state, "last": last}, method.name, leave=stop)
                if not bar.console.is_terminal:  # a log has no bar
                    log.info("%s: epoch %d of %d", method.name, number, spec.epochs)
    assert last is not None
    return _cells(spec, last, state[0])


class _Grid:
    """The programs of a grid: each works on all cells at once, arrays of [seeds, rates, ...]."""

    def __init__(self, task: Task, method: Method, spec: GridSpec):
        self.task, self.method, self.spec, self.steps = task, method, spec, task.steps(spec.batch)
        self.rates = jnp.asarray(spec.rates, jnp.float32)
        self.keys = jnp.stack([jax.random.key(s) for s in spec.seeds])
        self.each = _side_by_side if task.side_by_side else _in_turn
        self.shared = method.make(spec.rates[0]) if method.in_state else None

    def no_losses(self) -> jax.Array:
        """The sums of losses at the start of an epoch."""
        return jnp.zeros((len(self.keys), len(self.rates)))

    def transformation(self, rate: Any) -> optax.GradientTransformationExtraArgs:
        if self.shared is not None:
            return optax.with_extra_args_support(self.shared)
        if (factor := self.method.schedule) is not None:
            steps = self.steps * self.spec.epochs
            return optax.with_extra_args_support(
                self.method.make(lambda step: rate * factor(step / steps))
            )
        return optax.with_extra_args_support(self.method.make(rate))

    def init_seed(self, key: jax.Array) -> Any:
        params = self.task.init(jax.random.fold_in(key, 0))
        if self.method.in_state:
            states = [self.method.make(rate).init(params) for rate in self.spec.rates]
            states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        else:
            states = jax.vmap(lambda rate: self.transformation(rate).init(params))(self.rates)
        return jax.tree.map(lambda p: jnp.stack([p] * len(self.rates)), params), states

    def train_seed(self, first, last, train, key, params, state, losses):
        """Steps first..last-1 of the epoch that `key` shuffles, for every rate."""
        order = jax.random.permutation(jax.random.fold_in(key, 0), len(next(iter(train.values()))))

        def step(i, carry):
            rows = jax.lax.dynamic_slice_in_dim(order, i * self.spec.batch, self.spec.batch)
            batch, now = jax.tree.map(lambda x: x[rows], train), jax.random.fold_in(key, i + 1)

            def step_cell(rate, params, state, loss_sum):
                loss, grads = jax.value_and_grad(self.task.loss)(params, batch, now)
                update = self.transformation(rate).update
                updates, state = update(grads, state, params, value=loss)
                return optax.apply_updates(params, updates), state, loss_sum + loss / self.steps

            return self.each(step_cell, self.rates, *carry)

        return jax.lax.fori_loop(first, last, step, (params, state, losses))

    def advance(self, state, losses, number, first, last, train):
        """Steps first..last-1 of epoch `number`."""
        now = jax.vmap(lambda key: jax.random.fold_in(key, number + 1))(self.keys)
        run = partial(self.train_seed, first, last, train)
        params, opt_state, losses = self.each(run, now, *state, losses)
        return (params, opt_state), losses

    def measure(self, state, losses):
        def test(params, opt_state):
            return self.task.score(self.method.evaluated(opt_state, params))

        scores = self.each(lambda *cells: self.each(test, *cells), *state)
        return {"scores": {"train_loss": losses, **scores}, "learned": _learned(state[1])}


def _epochs(grid: _Grid, state: Any, start: int, bar: Progress) -> Iterator[tuple[Any, jax.Array]]:
    """Trains, and yields (state, mean losses) at the end of every epoch from `start` on. The state is donated."""
    advance = jax.jit(grid.advance, donate_argnums=(0, 1))
    train, steps = jax.tree.map(jnp.asarray, grid.task.train), grid.steps
    name, total = f"{grid.task.name}, {grid.method.name}", grid.spec.epochs * steps
    shown = bar.add_task(name, total=total, completed=start * steps)
    count = 1  # steps between two signs of life
    for number in range(start, grid.spec.epochs):
        losses, done = grid.no_losses(), 0
        while done < steps:
            began, until = time.perf_counter(), min(done + count, steps)
            state, losses = jax.block_until_ready(
                advance(state, losses, number, done, until, train)
            )
            done, count = until, _paced(until - done, time.perf_counter() - began)
            bar.update(shown, completed=number * steps + done)
        yield state, losses


def _save(saver: Checkpointer, epoch: int, tree: Any, name: str, *, leave: bool) -> None:
    """Saves the end of an epoch. To leave, also after the last one, or the next method would begin: raises Preempted."""
    saver.save(epoch, tree, {"epoch": epoch}, wait=leave)
    if leave:
        raise Preempted(f"{name}: stopped by a signal after epoch {epoch}; the state is saved")


def _side_by_side(function: Callable, *stacked: Any) -> Any:
    return jax.vmap(function)(*stacked)


def _in_turn(function: Callable, *stacked: Any) -> Any:
    return jax.lax.map(lambda cell: function(*cell), stacked)


def _paced(steps: int, seconds: float) -> int:
    """How many steps take about two seconds, after `steps` that took `seconds`; at most four times as many."""
    return max(1, min(4 * steps, int(2 * steps / max(seconds, 1e-6))))


def _learned(opt_state: Any) -> dict[str, jax.Array]:
    try:
        kinds = {"signal", "skipped", "of_peak"}
        return {k: v for k, v in learned(opt_state).items() if not kinds & set(k.split("/"))}
    except ValueError:  # nothing is
        return {}


def _placed(tree: Any) -> Any:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


def _row(spec: GridSpec, last: Mapping[str, Any]) -> dict[str, float]:
    """Means over seeds by initial rate, for the log and its curves."""
    row = {}
    for name, value in [*last["scores"].items(), *last["learned"].items()]:
        means = (
            np.asarray(value, np.float64).reshape(len(spec.seeds), len(spec.rates), -1).mean((0, 2))
        )
        row |= {f"{name} from {rate:g}": float(m) for rate, m in zip(spec.rates, means)}
    return row


def _cells(spec: GridSpec, last: Mapping[str, Any], params: Any) -> list[Cell]:
    finite = jax.tree.map(
        lambda x: np.isfinite(np.asarray(x)).reshape(*x.shape[:2], -1).all(-1), params
    )
    finite = np.logical_and.reduce(jax.tree.leaves(finite))

    def cell(s: int, r: int) -> Cell:
        scores, values = (
            {k: float(np.asarray(v)[s, r].mean()) for k, v in last[group].items()}
            for group in ("scores", "learned")
        )
        loss = scores.pop("train_loss")
        good = bool(finite[s, r]) and all(map(math.isfinite, (loss, *scores.values())))
        return Cell(spec.rates[r], spec.seeds[s], scores, loss, values, good)

    return [cell(s, r) for s in range(len(spec.seeds)) for r in range(len(spec.rates))]


def summary(cells: Sequence[Cell]) -> dict[str, float]:
    """Metrics of one initial rate over its seeds: means, and the share of runs that diverged."""
    metrics: dict[str, float] = {}
    for name in cells[0].scores:
        values = np.array([cell.scores[name] for cell in cells], np.float64)
        metrics[name] = float(values.mean())
        if len(cells) > 1:
            metrics[f"{name}_sd"] = float(values.std(ddof=1))
    metrics["train_loss"] = float(np.mean([cell.train_loss for cell in cells]))
    metrics |= {
        f"learned/{k}": float(np.mean([c.learned[k] for c in cells])) for k in cells[0].learned
    }
    metrics["diverged"] = float(np.mean([not cell.finite for cell in cells]))
    return metrics


def diverged(row: ResultRow, score: str) -> float:
    """The share of a row's seeds whose parameters, loss or score are not finite."""
    # Rows from before cells looked at their scores: the mean over seeds overflows as soon as one seed's does.
    overflown = 0.0 if math.isfinite(row.metrics[score]) else 1 / len(row.seeds)
    return max(row.metrics["diverged"], overflown)
