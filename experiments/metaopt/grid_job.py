"""Job "metaopt_grid": methods from many initial rates on one task. Skips the methods that have their rows."""

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from common.config import ConfigError, build, check_choices
from common.results import ResultRow, append_row
from experiments.metaopt.grid import GridSpec, Method, Task, diverged, run_grid, summary
from experiments.metaopt.methods import METHODS
from experiments.metaopt.pictures import draw
from experiments.metaopt.tasks.gpt import gpt_task
from experiments.metaopt.tasks.mlp import mlp_task
from experiments.metaopt.tasks.resnet import resnet_task
from experiments.metaopt.tasks.text import charrnn_task
from experiments.shared.run import Run, job

log = logging.getLogger("triptych")


@dataclass(frozen=True)
class TaskSettings:
    """What is trained on what.

    Attributes:
      data: a labelled data set of images (common.data.open_source), or where a text lies (sinks.text.documents).
      data_dir: of TFDS.
      hidden: units of the mlp and the charrnn, channels of the resnet's first stage, width of the gpt.
      depth: layers of the resnet, charrnn and gpt.  length: of a window of text, in characters.
      examples: images, or windows of text, at most; 0 = all.
    """

    kind: str
    data: str
    data_dir: str = ""
    hidden: int = 128
    depth: int = 0
    length: int = 0
    examples: int = 0


TASKS: dict[str, Callable[[TaskSettings], Task]] = {
    "mlp": lambda s: mlp_task(s.data, s.data_dir or None, s.hidden, s.examples or None),
    "resnet": lambda s: resnet_task(
        s.data, s.data_dir or None, s.hidden, s.depth, s.examples or None
    ),
    "charrnn": lambda s: charrnn_task(s.data, s.hidden, s.depth, s.length, s.examples or None),
    "gpt": lambda s: gpt_task(s.data, s.hidden, s.depth, s.length, s.examples or None),
}


def open_task(settings: TaskSettings) -> Task:
    """The task with its data in memory. Raises ConfigError where they cannot be had, or the sizes do not fit."""
    try:
        return TASKS[settings.kind](settings)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"config.task: {error}") from error


@job(only=("methods",))
def run(run: Run) -> int:
    """Runs the job; rows go to `workdir`/results.jsonl, one for each method and initial rate."""
    methods, spec, settings = resolve(run.values)
    task = open_task(settings)
    check_batch(task, spec)
    run.begin(0)
    rows = [row for method in methods for row in run_method(task, method, spec, run)]
    score = next(iter(rows[0].metrics))
    show(rows, f"{run.values['name']}: test {score} by initial rate", score)
    names = [method.name for method in methods]
    log.info("drew %s", draw(run.workdir, rows, names, spec, score))
    log.info("%.1f minutes in all; rows: %s", run.clock.seconds / 60, run.workdir / "results.jsonl")
    return 0


def check_batch(task: Task, spec: GridSpec) -> None:
    """Raises ConfigError where the batch is larger than the training set."""
    try:
        task.steps(spec.batch)
    except ValueError as error:
        raise ConfigError(f"config.grid: {error}") from error


def resolve(values: Mapping[str, Any]) -> tuple[list[Method], GridSpec, TaskSettings]:
    """Checks a config's dict. Raises ConfigError naming the setting, its value and the remedy."""
    for group in ("job", "name", "task", "grid", "methods"):
        if group not in values:
            raise ConfigError(f"config.{group} is missing")
    try:
        check_choices(methods=values["methods"])
    except ValueError as error:
        raise ConfigError(f"config: {error}") from error
    if unknown := [m for m in values["methods"] if m not in METHODS]:
        raise ConfigError(f"config.methods has {unknown[0]!r}; known: {', '.join(METHODS)}")
    settings = build(TaskSettings, values["task"], "config.task.")
    if settings.kind not in TASKS:
        raise ConfigError(
            f"config.task.kind={settings.kind!r} is unknown; known: {', '.join(TASKS)}"
        )
    spec = build(GridSpec, values["grid"], "config.grid.")
    return [METHODS[m] for m in values["methods"]], spec, settings


def run_method(task: Task, method: Method, spec: GridSpec, run: Run) -> list[ResultRow]:
    """Trains a method's grid and appends the rows that are not there; all of its rows.

    Raises:
      ConfigError: the method has rows of another config.
    """
    rows = partial(run.rows, {"method": method.name}, grid=dataclasses.asdict(spec))
    done = {row.overrides["initial_rate"]: row for row in rows()}
    if done.keys() >= set(spec.rates):
        log.info("%s: done before", method.name)
        return [done[rate] for rate in spec.rates]
    with run.part(method.name) as clock:
        cells = run_grid(task, method, spec, run.workdir / method.name)
    for rate in spec.rates:
        if rate in done:  # killed between two rows
            continue
        row = run.row(
            summary([cell for cell in cells if cell.rate == rate]),
            part={"method": method.name, "initial_rate": rate},
            seeds=spec.seeds,
            steps=spec.epochs * task.steps(spec.batch),
            wall_seconds=clock.seconds / len(spec.rates),
        )
        append_row(run.workdir / "results.jsonl", row)
    return rows()


@dataclass(frozen=True)
class Gap:
    """How far a method falls behind the best run of all, over its initial rates (docs/papers/gdtuo.md 6.3).

    Attributes:
      worst, mean: largest and geometric mean of score / best score; infinite where a run diverged.
      diverged: share of its runs.
    """

    worst: float
    mean: float
    diverged: float


def gaps(rows: list[ResultRow], score: str) -> dict[str, Gap]:
    """By method. The best score is that of the best method from its best initial rate."""
    scores: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    for row in rows:
        share = diverged(row, score)
        value = math.inf if share else row.metrics[score]
        scores.setdefault(row.overrides["method"], []).append(value)
        shares.setdefault(row.overrides["method"], []).append(share)
    best = max(min(map(min, scores.values())), 1e-12)
    return {
        method: Gap(
            max(values) / best,
            math.exp(statistics.fmean(math.log(max(value, 1e-12) / best) for value in values)),
            statistics.fmean(shares[method]),
        )
        for method, values in scores.items()
    }


def wide_console() -> Console:
    """A log has no width of its own: tables keep theirs."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def show(rows: list[ResultRow], title: str, score: str = "error") -> None:
    """Prints a table, methods down, initial rates across; a star marks runs that diverged.

    The last columns say how many times the best score of the table the method's worst and mean are.
    """
    rates = sorted({row.overrides["initial_rate"] for row in rows})
    table = Table(title=title)
    table.add_column("method")
    for rate in rates:
        table.add_column(f"{rate:g}", justify="right")
    for column in ("worst", "mean"):
        table.add_column(column, justify="right")
    for method, gap in gaps(rows, score).items():
        by_rate = {r.overrides["initial_rate"]: r for r in rows if r.overrides["method"] == method}
        cells = [_cell(by_rate.get(rate), score) for rate in rates]
        table.add_row(method, *cells, f"{gap.worst:.3g} x", f"{gap.mean:.3g} x")
    wide_console().print(table)


def _cell(row: ResultRow | None, score: str) -> str:
    if row is None:
        return ""
    value = row.metrics[score]
    text = f"{100 * value:.2f} %" if score == "error" else f"{value:.3g}"
    return text + ("*" if diverged(row, score) else "")
