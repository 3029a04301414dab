"""Job "metaopt_grid": methods from many initial rates on one task. Skips the methods that have their rows."""

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from common.config import ConfigError, build, check_choices
from common.results import ResultRow, append_row, markdown_table
from experiments.metaopt.grid import GridSpec, Method, Task, diverged, run_grid, summary
from experiments.metaopt.methods import METHODS
from experiments.metaopt.pictures import draw_grid
from experiments.metaopt.tasks.gpt import gpt_task
from experiments.metaopt.tasks.mlp import mlp_task
from experiments.metaopt.tasks.resnet import resnet_task
from experiments.metaopt.tasks.text import charrnn_task
from experiments.shared.run import Run, job
from experiments.shared.tables import percent, perplexity

log = logging.getLogger("triptych")


# By kind: what makes the task from its data, and which settings it takes.
TASKS: dict[str, tuple[Callable[..., Task], tuple[str, ...]]] = {
    "mlp": (mlp_task, ("data_dir", "hidden", "examples")),
    "resnet": (resnet_task, ("data_dir", "hidden", "depth", "examples")),
    "charrnn": (charrnn_task, ("hidden", "depth", "length", "examples")),
    "gpt": (gpt_task, ("hidden", "depth", "length", "examples")),
}


@dataclass(frozen=True)
class TaskSettings:
    """What is trained on what.

    Attributes:
      kind: "mlp", "resnet", "charrnn" or "gpt".
      data: a labelled data set of images (common.data.open_source), or where a text lies (sinks.text.documents).
      data_dir: folder of TFDS data sets; None takes TFDS_DATA_DIR.
      hidden: units of the mlp and the charrnn, channels of the resnet's first stage, width of the gpt; None: the task's own.
      depth: layers of the resnet, the charrnn or the gpt; None: the task's own.
      length: characters of a window of text; None: the task's own.
      examples: images, or windows of text, at most; None takes all.
    """

    kind: str = "mlp"
    data: str = "mnist"
    data_dir: str | None = None
    hidden: int | None = None
    depth: int | None = None
    length: int | None = None
    examples: int | None = None

    def __post_init__(self):
        if self.kind not in TASKS:
            raise ValueError(f"kind={self.kind!r} is unknown; known: {', '.join(TASKS)}")
        if unused := self.sizes.keys() - {"data_dir", *TASKS[self.kind][1]}:
            raise ValueError(
                f"kind={self.kind!r} takes no {', '.join(sorted(unused))}: set it to None"
            )

    @property
    def sizes(self) -> dict[str, Any]:
        """What is set but the kind and the data."""
        rest = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("kind", "data")}
        return {k: v for k, v in rest.items() if v is not None}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of the job.

    Attributes:
      job: what is run, a key of experiments.jobs.JOBS.  name: the experiment's name, in rows and in the log.
      methods: names of experiments.metaopt.methods.METHODS.
    """

    job: str = "metaopt_grid"
    name: str = ""
    task: TaskSettings
    grid: GridSpec
    methods: tuple[str, ...] = ()

    def __post_init__(self):
        check_choices(methods=self.methods)
        if unknown := [m for m in self.methods if m not in METHODS]:
            raise ConfigError(f"config.methods has {unknown[0]!r}; known: {', '.join(METHODS)}")


def open_task(settings: TaskSettings) -> Task:
    """The task with its data in memory. Raises ConfigError if the data cannot be read or the sizes do not fit."""
    make, known = TASKS[settings.kind]
    try:
        return make(settings.data, **{k: v for k, v in settings.sizes.items() if k in known})
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"config.task: {error}") from error


@job(Settings, only=("methods",))
def run(run: Run) -> int:
    """Runs the job; rows go to `workdir`/results.jsonl, one for each method and initial rate."""
    settings = build(Settings, run.values)
    task, spec = open_task(settings.task), settings.grid
    check_batch(task, spec)
    run.begin(0)
    rows = [row for name in settings.methods for row in run_method(task, METHODS[name], spec, run)]
    score = next(iter(rows[0].metrics))
    log.info("%s: test %s by initial rate\n%s", settings.name, score, grid_table(rows, score))
    log.info("drew %s", draw_grid(run.workdir, rows, settings.methods, spec, score))
    log.info("%.1f minutes in all; rows: %s", run.clock.seconds / 60, run.workdir / "results.jsonl")
    return 0


def check_batch(task: Task, spec: GridSpec) -> None:
    """Raises ConfigError where the batch is larger than the training set."""
    try:
        task.steps(spec.batch)
    except ValueError as error:
        raise ConfigError(f"config.grid: {error}") from error


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


def gaps(rows: Sequence[ResultRow], score: str) -> dict[str, Gap]:
    """The gap of each method. The best score is that of the best method from its best initial rate."""
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


def grid_table(rows: Sequence[ResultRow], score: str = "error") -> str:
    """A Markdown table: methods down, best first, initial rates across; a star marks runs that diverged.

    The last columns are those of `Gap`. Errors are in percent.
    """
    rates = sorted({row.overrides["initial_rate"] for row in rows})
    lines = [
        (
            method,
            *[score_at(rows, method, rate, score) for rate in rates],
            *[f"{x:.3g}" for x in (gap.worst, gap.mean)],
            f"{gap.diverged:.2g}",
        )
        for method, gap in sorted(gaps(rows, score).items(), key=lambda item: item[1].worst)
    ]
    header = ("method", *[f"{r:g}" for r in rates], "worst", "mean", "diverged")
    return markdown_table(header, lines)


def score_at(rows: Sequence[ResultRow], method: str, rate: float, score: str = "error") -> str:
    """The score of one run; a star where it diverged, "" where there is none."""
    for row in rows:
        if row.overrides["method"] == method and row.overrides["initial_rate"] == rate:
            show = percent if score == "error" else perplexity
            return show(row.metrics[score]) + ("*" if diverged(row, score) else "")
    return ""
