"""The learned rate on scikit-learn's digits, for `make reproduce`: fixed, the paper's towers and ours, over initial rates.

A table, a picture (metaopt_digits.png) and rows, in under a minute on two cores.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from common.results import ResultRow
from common.writers import read_metrics
from experiments.metaopt.grid import GridSpec
from experiments.metaopt.grid_job import TaskSettings, grid_table, run_method
from experiments.metaopt.methods import METHODS
from experiments.metaopt.tasks.mlp import mlp_task
from experiments.shared.run import Run, job

RATES = (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e2)
SHOWN = {
    "sgd": "fixed",
    "tower1(sgd)": "paper, height 1",
    "tower3(sgd)": "paper, height 3",
    "auto(sgd)": "ours",
}
COLORS = {
    "sgd": "#8a8a8a",
    "tower1(sgd)": "#d9a441",
    "tower3(sgd)": "#e4572e",
    "auto(sgd)": "#1f6f8b",
}
SPEC = GridSpec(epochs=40, batch=64, rates=RATES, seeds=(0, 1), save_every=40)
log = logging.getLogger("triptych")


def run(workdir: Path, methods: Sequence[str] = tuple(SHOWN), spec: GridSpec = SPEC) -> int:
    """Trains what has no rows in `workdir`/results.jsonl yet, prints the table, and draws the picture. Returns an exit code.

    Each row is a method from one initial rate: overrides {"method", "initial_rate"}, metrics "error" (test error in [0, 1],
    mean over seeds), "learned/learning_rate", "diverged".
    """
    values = {
        "job": "metaopt_digits",
        "name": "metaopt_digits",
        "task": dataclasses.asdict(TaskSettings("mlp", "digits", hidden=32)),
        "grid": dataclasses.asdict(spec),
        "methods": methods,
    }

    @job(only=("methods",))
    def grid(run: Run) -> int:
        task = mlp_task("digits", hidden=32)
        run.begin(0)
        rows = [row for name in methods for row in run_method(task, METHODS[name], spec, run)]
        log.info("Digits: test error in %% by initial rate, 40 epochs of SGD\n%s", grid_table(rows))
        picture(rows, workdir)
        log.info("drew %s", workdir / "metaopt_digits.png")
        return 0

    return grid(Run(values, workdir, resume="changed", has_flag=False))


def picture(rows: Sequence[ResultRow], workdir: Path) -> None:
    """Left: the error by initial rate. Right: how our rate moves, from each initial rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for method, title in SHOWN.items():
        own = sorted((r.overrides["initial_rate"], 100 * r.metrics["error"]) for r in rows
                     if r.overrides["method"] == method)  # fmt: skip
        if own:
            left.plot(*zip(*own), marker="o", ms=4, color=COLORS[method], label=title)
    left.set(xscale="log", xlabel="initial learning rate", ylabel="test error (%)", ylim=(0, 100))
    left.legend(frameon=False, fontsize=8)
    curves = read_metrics(workdir / "auto(sgd)" / "metrics.jsonl")
    for i, rate in enumerate(RATES):
        key = f"learning_rate from {rate:g}"
        points = [(0, rate), *((row["step"], row[key]) for row in curves if key in row)]
        shade = plt.get_cmap("viridis")(i / len(RATES))
        right.plot(*np.array(points).T, color=shade, label=f"{rate:g}")
    right.set(yscale="log", xlabel="epoch", ylabel="learning rate")
    right.set_title("ours, from each initial rate", fontsize=9, loc="left")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    figure.savefig(workdir / "metaopt_digits.png", dpi=120)
    plt.close(figure)
