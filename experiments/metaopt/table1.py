"""Job "metaopt_table1": every row of Table 1, and each tower's rerun with the hyperparameters it ended at (section 3.1)."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optax

from common.config import ConfigError, build, check_choices
from common.results import ResultRow, append_row, markdown_table, read_rows
from experiments.metaopt.grid import GridSpec, Method, Task, run_grid, summary
from experiments.metaopt.grid_job import TaskSettings, check_batch, open_task
from experiments.shared.published import published
from experiments.shared.run import Run, job
from metaopt import paper

log = logging.getLogger("triptych")
Make = Callable[[], optax.GradientTransformation]


@dataclass(frozen=True)
class Row:
    """One line: a name, epochs, the tower (None above: fixed), and the plain optimizer that its learned values set."""

    name: str
    epochs: int
    make: Make
    rerun: Callable[[dict[str, float]], optax.GradientTransformation] | None


def _sgd(h: dict[str, float]) -> optax.GradientTransformation:
    return paper.sgd(h["learning_rate"])


def _adagrad(h: dict[str, float]) -> optax.GradientTransformation:
    return paper.adagrad(h["learning_rate"])


def _adam(h: dict[str, float]) -> optax.GradientTransformation:
    return paper.adam(h["learning_rate"], h.get("b1", 0.9), h.get("b2", 0.999))


def _rmsprop(h: dict[str, float]) -> optax.GradientTransformation:
    return paper.rmsprop(h["learning_rate"], h.get("decay", 0.99))


def _rms(by: optax.GradientTransformation, both: bool) -> optax.GradientTransformation:
    return paper.rmsprop(0.01, 0.99, by=by, learn_decay=both)


ROWS = [
    Row("SGD(0.01)", 30, lambda: paper.sgd(0.01), None),
    Row("SGD/SGD(0.01)", 30, lambda: paper.sgd(0.01, by=paper.sgd(0.01)), _sgd),
    Row("SGD/Adam(0.1)", 30, lambda: paper.sgd(0.01, by=paper.adam(0.1)), _sgd),
    Row("SGD/AdaGrad(0.01)", 30, lambda: paper.sgd(0.01, by=paper.adagrad(0.01)), _sgd),
    Row("SGD/RMSProp(0.1)", 30, lambda: paper.sgd(0.01, by=paper.rmsprop(0.1)), _sgd),
    Row("Adam(0.001)", 5, lambda: paper.adam(1e-3), None),
    Row("Adam/SGD(1e-5)", 5, lambda: paper.adam(1e-3, by=paper.sgd(1e-5)), _adam),
    Row("Adam-alpha/SGD(1e-5)", 5, lambda: paper.adam_baydin(1e-3, by=paper.sgd(1e-5)), _adam),
    Row("Adam/Adam", 5, lambda: paper.adam(1e-3, by=paper.adam(1e-3)), _adam),
    Row("Adam-alpha/Adam", 5, lambda: paper.adam_baydin(1e-3, by=paper.adam(1e-3)), _adam),
    Row("AdaGrad(0.01)", 30, lambda: paper.adagrad(0.01), None),
    Row("AdaGrad/SGD(0.01)", 30, lambda: paper.adagrad(0.01, by=paper.sgd(0.01)), _adagrad),
    Row("AdaGrad/AdaGrad(0.01)", 30, lambda: paper.adagrad(0.01, by=paper.adagrad(0.01)), _adagrad),
    Row("RMSProp(0.01)", 5, lambda: paper.rmsprop(0.01), None),
    Row("RMSProp-alpha/SGD(1e-4)", 5, lambda: _rms(paper.sgd(1e-4), False), _rmsprop),
    Row("RMSProp-alpha,gamma/SGD(1e-4)", 5, lambda: _rms(paper.sgd(1e-4), True), _rmsprop),
    Row("RMSProp-alpha/RMSProp(1e-4)", 5, lambda: _rms(paper.rmsprop(1e-4), False), _rmsprop),
    Row("RMSProp-alpha,gamma/RMSProp(1e-4)", 5, lambda: _rms(paper.rmsprop(1e-4), True), _rmsprop),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of the job.

    Attributes:
      job: what is run, a key of experiments.jobs.JOBS.  name: the experiment's name, in rows and in the log.
      rows: names of rows of the table; None takes all.
    """

    job: str = "metaopt_table1"
    name: str = "mnist_table1"
    task: TaskSettings
    grid: GridSpec
    rows: tuple[str, ...] | None = None

    def __post_init__(self):
        known = [row.name for row in ROWS]
        check_choices(rows=known if self.rows is None else self.rows)
        if unknown := [name for name in self.rows or () if name not in known]:
            raise ConfigError(f"config.rows has {unknown[0]!r}; known: {', '.join(known)}")


@job(Settings, only=("rows",))
def run(run: Run) -> int:
    """Runs what has no row in `workdir`/results.jsonl yet, and prints the table next to the paper's."""
    settings = build(Settings, run.values)
    task, spec = open_task(settings.task), settings.grid
    check_batch(task, spec)
    known = {row.name: row for row in ROWS}
    chosen = ROWS if settings.rows is None else [known[name] for name in settings.rows]
    run.begin(0)
    for row in chosen:
        learned = _train(task, row.name, row.make, row, spec, run)
        if row.rerun is not None:
            rerun = row.rerun
            _train(task, f"{row.name}, rerun", lambda h=learned, r=rerun: r(h), row, spec, run)
    rows = read_rows(run.workdir / "results.jsonl")
    log.info("Table 1: test error (%%), mean ± sd over seeds\n%s", with_published(rows))
    log.info("%.1f minutes in all; rows: %s", run.clock.seconds / 60, run.workdir / "results.jsonl")
    return 0


def _train(
    task: Task, name: str, make: Make, row: Row, spec: GridSpec, run: Run
) -> dict[str, float]:
    """Trains one line over the seeds unless it is done; returns the mean learned values of its lowest level."""
    if done := run.rows({"row": name}):
        metrics = done[0].metrics
    else:
        epochs = min(row.epochs, spec.epochs)
        own = GridSpec(epochs, spec.batch, (1.0,), spec.seeds, spec.save_every)
        folder = name.replace("/", "-").replace(" ", "")
        with run.part(folder) as clock:
            cells = run_grid(task, Method(name, lambda rate: make()), own, run.workdir / folder)
        metrics = summary(cells)
        result = run.row(
            metrics,
            part={"row": name},
            seeds=spec.seeds,
            steps=epochs * task.steps(spec.batch),
            wall_seconds=clock.seconds,
        )
        append_row(run.workdir / "results.jsonl", result)
        log.info("%s: %.2f %%", name, 100 * metrics["error"])
    prefix = "learned/"
    return {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}


def with_published(rows: Sequence[ResultRow]) -> str:
    """The table in Markdown: test errors in percent, ours next to the paper's."""
    done = {row.overrides["row"]: row for row in rows}
    paper, papers_rerun = printed(False), printed(True)
    lines = []
    for name in (row.name for row in ROWS if row.name in done):
        again = done.get(f"{name}, rerun")
        rerun = (percent(again.metrics), papers_rerun[name]) if again else ("", "")
        lines.append((name, percent(done[name].metrics), paper[name], *rerun, done[name].id))
    return markdown_table(("optimizer", "ours", "paper", "rerun", "paper's rerun", "row"), lines)


def printed(rerun: bool) -> dict[str, str]:
    """The paper's test errors in percent, by a row's name: its own, or those of its rerun with the learned values."""
    rows = [
        p for p in published("metaopt") if p.id.startswith("table1") and p.metric == "test error"
    ]
    return {p.what: p.value for p in rows if p.id.endswith("/rerun") == rerun}


def percent(metrics: dict[str, float]) -> str:
    """The test error in percent, with its spread over seeds where there are several."""
    spread = metrics.get("error_sd")
    return f"{100 * metrics['error']:.2f}" + (
        f" ± {100 * spread:.2f}" if spread is not None else ""
    )
