"""The picture of a grid: how its runs went (few initial rates, figures 2 and 3), or how they ended (many, figure 4)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from common.plots import COLORS
from common.results import ResultRow
from common.writers import read_metrics
from experiments.metaopt.grid import GridSpec, diverged

FEW = 4  # initial rates that each get a column
NAMES = {
    "error": "test error (%)",
    "perplexity": "test perplexity",
    "train_loss": "training loss (nats)",
    "learning_rate": "learning rate",
}


def draw_grid(
    workdir: Path, rows: Sequence[ResultRow], methods: Sequence[str], spec: GridSpec, score: str
) -> Path:
    """Draws `workdir`/grid.png from the rows and metrics.jsonl of `methods`, and returns its path.

    With at most four initial rates a column for each: the score, the training loss and the learned rate by epoch, means over
    seeds. Otherwise the final score by initial rate.
    """
    path = workdir / "grid.png"
    if len(spec.rates) <= FEW:
        figure = over_time(workdir, methods, spec.rates, score)
    else:
        figure = by_rate(rows, methods, score)
    figure.savefig(path, dpi=120)
    return path


def over_time(workdir: Path, methods: Sequence[str], rates: Sequence[float], score: str) -> Figure:
    """Curves by epoch: quantities down, initial rates across, a line for each method."""
    logs = {method: read_metrics(workdir / method / "metrics.jsonl") for method in methods}
    shown = [score, "train_loss"]
    if any(key.startswith("learning_rate ") for log in logs.values() for key in log[-1]):
        shown.append("learning_rate")
    figure, axes = _figure(len(shown), len(rates), width=max(3.2, 6.4 / len(rates)))
    for (method, curves), (color, dash) in zip(logs.items(), _styles(methods)):
        for column, rate in zip(axes.T, rates):
            for ax, name in zip(column, shown):
                key = f"{name} from {rate:g}"
                points = [(row["step"], _natural(name, row[key])) for row in curves if key in row]
                if points:
                    ax.plot(*zip(*points), color=color, ls=dash, lw=1.3, label=method)
    for column, rate in zip(axes.T, rates):
        column[0].set_title(f"initial rate {rate:g}", loc="left", fontsize=9)
        column[-1].set(xlabel="epoch")
    for line, name in zip(axes, shown):
        line[0].set_ylabel(NAMES[name])
        for ax in line:
            if name != "error":
                _log(ax)
    _legend(figure, axes[0, 0])
    return figure


def by_rate(rows: Sequence[ResultRow], methods: Sequence[str], score: str) -> Figure:
    """The final score by initial rate, a line for each method; runs that diverged are gaps."""
    figure, axes = _figure(1, 1, width=6.5, height=4.2)
    ax = axes[0, 0]
    for method, (color, dash) in zip(methods, _styles(methods)):
        own = sorted(
            (
                row.overrides["initial_rate"],
                _natural(score, np.nan if diverged(row, score) else row.metrics[score]),
            )
            for row in rows
            if row.overrides["method"] == method
        )
        if own:
            ax.plot(*zip(*own), color=color, ls=dash, lw=1.3, marker="o", ms=3, label=method)
    ax.set(xscale="log", xlabel="initial rate", ylabel=NAMES[score])
    _log(ax)
    _legend(figure, ax)
    return figure


def _figure(
    rows: int, columns: int, width: float = 3.2, height: float = 2.1
) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.tick_params(labelsize=7, which="both")
    return figure, axes


def _styles(methods: Sequence[str]) -> list[tuple[str, str]]:
    """A color and a dash for each: dashes tell apart what shares a color."""
    return [
        (COLORS[i % len(COLORS)], ("-", "--", ":")[i // len(COLORS) % 3])
        for i in range(len(methods))
    ]


def _natural(name: str, value: float) -> float:
    """Errors in percent; what is not a finite number, or too large to draw, is a gap."""
    value = 100 * value if name == "error" else value
    return value if np.isfinite(value) and abs(value) < 1e6 else np.nan


def _log(ax: Axes) -> None:
    """A logarithmic axis with plain numbers, also where it spans less than a decade.

    Linear below 1e-8 where a value is not positive: a raw rate may turn negative (docs/papers/gdtuo.md 1.3).
    """
    if any((np.asarray(line.get_ydata()) <= 0).any() for line in ax.lines):
        ax.set_yscale("symlog", linthresh=1e-8)
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(LogFormatter())
    ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=int(figure.get_figwidth() / 2.1),  # inches for the longest name
            frameon=False,
            fontsize=8,
        )
