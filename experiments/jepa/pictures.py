"""What I-JEPA sees and what it learned, as one picture."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from common.data import Source, subset
from common.writers import read_metrics
from experiments.jepa.settings import Settings
from jepa.masks import Masks, sample

COLORS = {"jepa": "#1f6f8b", "untrained": "#b9b9b9", "pixels": "#d9a441"}
TARGET_COLORS = ("#e4572e", "#17bebb", "#ffc914", "#8f5fd7")
TITLES = {"jepa": "I-JEPA", "untrained": "untrained", "pixels": "pixels"}

Accuracy = Mapping[str, Mapping[str, tuple[float, float]]]  # kind -> label -> (mean, spread)


def report_picture(
    path: Path,
    settings: Settings,
    source: Source,
    accuracy: Accuracy,
    majority: Mapping[str, float],
    workdir: Path,
) -> None:
    """Draws images with their masks, probe accuracies, and the runs' kNN curves into one PNG.

    Args:
      accuracy: kind of features -> label -> (mean, spread) over seeds.  majority: share of the most frequent class.
      workdir: holds seed*/metrics.jsonl.
    """
    figure = plt.figure(figsize=(12, 7.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.15)).flat
    _masked_images(top, settings, source)
    left, right = bottom.subplots(1, 2, width_ratios=(1.35, 1))
    _bars(left, accuracy, majority)
    _knn_curves(right, workdir)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _masked_images(figure, settings: Settings, source: Source, n: int = 6) -> None:
    model, spec = settings.recipe.model, settings.recipe.masks
    masks = sample(spec, settings.train.seed, np.arange(n))
    source = subset(source, n)
    axes = figure.subplots(2, n)
    for i in range(n):
        image = settings.evaluation_crop(source[i], np.random.default_rng(0))["image"]
        axes[0, i].imshow(image)
        axes[1, i].imshow(_with_masks(image, masks, i, model.patch))
        for ax in axes[:, i]:
            ax.set_axis_off()
    axes[0, 0].set_title("the target encoder sees", loc="left", fontsize=9)
    axes[1, 0].set_title("the context encoder sees (targets outlined)", loc="left", fontsize=9)


def _with_masks(image: np.ndarray, masks: Masks, i: int, patch: int) -> np.ndarray:
    """The image greyed out but for the context, with each target block's border in its colour."""
    H, W, _ = image.shape
    rows, cols = H // patch, W // patch
    scale = max(1, 256 // H)
    large = image.repeat(scale, 0).repeat(scale, 1).astype(np.float32) / 255
    cell = patch * scale

    def area(indices: np.ndarray) -> np.ndarray:
        grid = np.zeros(rows * cols, bool)
        grid[indices] = True
        return grid.reshape(rows, cols).repeat(cell, 0).repeat(cell, 1)

    context = area(masks.context[i][masks.context_valid[i]])
    shown = np.where(context[..., None], large, 0.86 + 0.08 * large)
    width = max(2, cell // 8)
    for m, color in zip(range(masks.targets.shape[1]), TARGET_COLORS):
        block = area(masks.targets[i, m][masks.target_valid[i, m]])
        inner = block.copy()
        for axis in (0, 1):
            for shift in (-width, width):
                inner &= np.roll(block, shift, axis)
        # A block that touches the image's edge wraps in `roll`: its outer border is drawn as well.
        edge = np.zeros_like(block)
        edge[:width], edge[-width:], edge[:, :width], edge[:, -width:] = True, True, True, True
        border = block & (~inner | edge)
        shown[border] = to_rgb(color)
    return shown


def _bars(ax: Axes, accuracy: Accuracy, majority: Mapping[str, float]) -> None:
    labels = list(majority)
    width = 0.26
    for k, (kind, values) in enumerate(accuracy.items()):
        x = np.arange(len(labels)) + (k - 1) * width
        means = [100 * values[name][0] for name in labels]
        spreads = [100 * values[name][1] for name in labels]
        bars = ax.bar(
            x,
            means,
            width * 0.94,
            color=COLORS[kind],
            label=TITLES[kind],
            # The bars' own error bars: `bar_label` writes above them.
            yerr=spreads if np.isfinite(spreads).all() else None,
            error_kw=dict(ecolor="#333333", capsize=2, lw=1),
        )
        ax.bar_label(bars, [f"{m:.0f}" for m in means], fontsize=8, padding=3)
    for i, name in enumerate(labels):
        ax.plot([i - 0.45, i + 0.45], [100 * majority[name]] * 2, color="#444444", lw=1, ls=":")
    ax.plot([], [], color="#444444", lw=1, ls=":", label="most frequent class")
    ax.set_xticks(range(len(labels)), [f"{name}" for name in labels])
    ax.set_ylabel("linear probe, test accuracy (%)")
    ax.set_ylim(0, 1.15 * ax.get_ylim()[1])
    ax.legend(frameon=False, ncols=4, fontsize=8, loc="upper left")
    ax.spines[["top", "right"]].set_visible(False)


def _knn_curves(ax: Axes, workdir: Path) -> None:
    labels: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for path in sorted(workdir.glob("seed*/metrics.jsonl")):
        rows = read_metrics(path)
        for key in {k for row in rows for k in row if k.startswith("eval/knn_")}:
            found = [(row["step"], row[key]) for row in rows if key in row]
            steps, values = np.array(found).T
            labels.setdefault(key.removeprefix("eval/knn_"), []).append((steps, 100 * values))
    for (name, curves), color in zip(sorted(labels.items()), ("#1f6f8b", "#e4572e", "#8f5fd7")):
        for steps, values in curves:
            ax.plot(steps, values, color=color, lw=1.6, marker="o", ms=3)
        ax.annotate(
            name, (curves[0][0][-1], curves[0][1][-1]), xytext=(4, 0), textcoords="offset points",
            color=color, fontsize=9, va="center",
        )  # fmt: skip
    ax.set_title("kNN accuracy during pretraining (%)", fontsize=10, loc="left")
    ax.set_xlabel("step")
    ax.margins(x=0.12)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
