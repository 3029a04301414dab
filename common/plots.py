"""The curves of a run, in one picture: a small panel for each thing that was measured."""

import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator

from common.full_disk import is_full
from common.writers import read_metrics

log = logging.getLogger("triptych")

COLORS = ("#2f6db5", "#d1702a", "#3a8f5a", "#a5478a", "#7a6a2f", "#4f5b66")  # of one panel's lines
INK, GREY, BAD = "#222222", "#8a8a8a", "#c62828"
PANEL_INCHES = (3.5, 2.3)
NOT_CURVES = ("step", "wall")


def curves(
    rows: Sequence[Mapping[str, float]],
    path: str | os.PathLike[str],
    groups: Mapping[str, Sequence[str] | Mapping[str, str]] | None = None,
) -> None:
    """Draws the rows of a `metrics.jsonl` (`common.writers.read_metrics`) into a PNG.

    Args:
      rows: each with a `step` and any scalars; a series may be missing from any row.
      path: of the PNG. Its folder is made.
      groups: panel title -> the series in it, in order, or series -> what to call it; every series its
        own panel by default, the loss first. Series no row holds are left out.

    Non-finite values are gaps, marked in red at the foot of the panel. A long series is drawn pale,
    with its moving average over it; the numbers at the right are where the lines end.
    """
    names = list(dict.fromkeys(k for row in rows for k in row if k not in NOT_CURVES))
    if groups is None:
        names.sort(key=lambda name: "loss" not in name)
        groups = {name: (name,) for name in names}
    panels = {
        title: kept
        for title, series in groups.items()
        if (kept := [(s, _called(series, s)) for s in series if s in names])
    }
    n = max(1, len(panels))
    n_columns = min(n, 2 if n == 4 else 3)
    n_rows = math.ceil(n / n_columns)
    size = n_columns * PANEL_INCHES[0], n_rows * PANEL_INCHES[1]
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    all_axes = figure.subplots(n_rows, n_columns, squeeze=False).flat
    last_step = max((row["step"] for row in rows), default=0)
    for ax, (title, series) in zip(all_axes, panels.items()):
        _panel(ax, title, {called: _series(rows, name) for name, called in series}, last_step)
    for ax in list(all_axes)[len(panels) :]:
        ax.set_axis_off()
    if not panels:
        figure.text(0.5, 0.5, "nothing measured yet", ha="center", va="center", color=GREY)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144, facecolor="white")


def draw_curves(workdir: Path) -> None:
    """Draws `workdir`/metrics.jsonl into curves.png, on process 0.

    Never raises: it is drawn on the way out of failures too, which it must not hide.
    """
    path = workdir / "metrics.jsonl"
    if jax.process_index() != 0 or not path.exists():
        return
    leaving_with = sys.exc_info()[1]
    try:
        curves(read_metrics(path), workdir / "curves.png")
    except Exception as error:
        if not (is_full(leaving_with) and is_full(error)):  # once is enough
            log.warning("%s is not drawn: %s", workdir / "curves.png", error)


def _called(series: Sequence[str] | Mapping[str, str], name: str) -> str:
    return series[name] if isinstance(series, Mapping) else name


def _series(rows: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = np.asarray(points, np.float64).T
    return steps, values


def _panel(
    ax: Axes, title: str, series: Mapping[str, tuple[np.ndarray, np.ndarray]], last_step: float
) -> None:
    ends = []
    for (name, (steps, values)), color in zip(series.items(), COLORS * len(series)):
        finite = np.isfinite(values)
        values = np.where(finite, values, np.nan)
        if not finite.all():
            foot = ax.get_xaxis_transform()  # x in steps, y in parts of the panel
            ax.plot(
                steps[~finite], steps[~finite] * 0, "|", color=BAD, markersize=9, transform=foot
            )
        if not finite.any():
            continue
        smooth = _moving_average(values)
        line = values if smooth is None else smooth
        if smooth is not None:
            ax.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        marker = "o" if finite.sum() <= 20 else ""
        ax.plot(steps, line, color=color, linewidth=1.5, marker=marker, markersize=3)
        last = np.flatnonzero(finite)[-1]
        ends.append((line[last], name, color))
    _style(ax, title, last_step)
    if ends:
        _label(ax, ends, named=len(series) > 1)
    else:
        ax.text(
            0.5, 0.5, "no finite value", transform=ax.transAxes, ha="center", fontsize=8, color=BAD
        )


def _moving_average(values: np.ndarray) -> np.ndarray | None:
    """The mean of the finite values in a window of 1/50 of the curve around each point.

    None where it would show nothing new: under 100 points, or on a smooth series like a schedule.
    """
    n, half = len(values), len(values) // 100
    finite = np.isfinite(values)
    low, high = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    in_window = counts[high] - counts[low]
    smooth = np.where(in_window > 0, (sums[high] - sums[low]) / np.maximum(in_window, 1), np.nan)
    noise = np.sqrt(np.nanmean((values - smooth) ** 2))
    return smooth if noise > 0.02 * np.ptp(values[finite]) else None


def _style(ax: Axes, title: str, last_step: float) -> None:
    ax.set_title(title, loc="left", fontsize=9, color=INK, fontweight="bold")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(GREY)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=GREY, labelsize=7, length=0)
    ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlim(0, max(1, last_step) * 1.02)


def _label(ax: Axes, ends: list[tuple[float, str, str]], *, named: bool) -> None:
    """Writes each line's last value (and name, when there are several) at its right end."""
    low, high = ax.get_ylim()
    gap = 0.11 * (high - low)
    y = -math.inf
    for value, name, color in sorted(ends):
        y = max(value, y + gap)  # apart where lines end close together
        text = f"{name} {value:.3g}" if named else f"{value:.3g}"
        ax.annotate(
            text, (1.0, y), xycoords=ax.get_yaxis_transform(), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=7, color=color, annotation_clip=False,
        )  # fmt: skip
