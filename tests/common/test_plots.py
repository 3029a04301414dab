"""A picture always comes out, whatever a run has measured so far, and shows all of it."""

import itertools
import math

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from common import plots
from common.plots import curves

ROWS = [{"step": s, "wall": 1.7e9 + s, "lr": 1e-3, "loss": 2.0 / (s + 1)} for s in range(10)] + [
    {"step": s, "wall": 1.7e9 + s, "knn": 0.5} for s in (0, 4, 8)
]


@pytest.fixture
def figures(monkeypatch):
    made = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(plots, "Figure", Kept)
    return made


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes if ax.axison]


def ink(path):
    """How much of the picture is not white, 0 to 1."""
    return (image.imread(path)[..., :3].min(-1) < 0.95).mean()


def test_every_series_gets_a_panel_the_loss_first(tmp_path, figures):
    curves(ROWS, tmp_path / "deep" / "curves.png")
    assert titles(figures[0]) == ["loss", "lr", "knn"]
    assert ink(tmp_path / "deep" / "curves.png") > 0.005


def test_groups_choose_panels_and_order_and_name_their_lines(tmp_path, figures):
    groups = {"both": ["knn", "loss"], "gone": ["nothing"], "rate": ["lr"]}
    curves(ROWS, tmp_path / "c.png", groups)
    assert titles(figures[0]) == ["both", "rate"]
    labels = [text.get_text() for text in figures[0].axes[0].texts]
    assert sorted(labels) == ["knn 0.5", "loss 0.2"]


def test_labels_of_lines_that_end_together_do_not_overlap(tmp_path, figures):
    rows = [{"step": s, "a": s, "b": s + 0.01, "c": s + 0.02} for s in range(10)]
    curves(rows, tmp_path / "c.png", {"all": ["a", "b", "c"]})
    boxes = [text.get_window_extent() for text in figures[0].axes[0].texts]
    boxes.sort(key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 0, "wall": 1.0}],
        [{"step": 0, "loss": 1.0}],
        [{"step": 5, "loss": math.nan}],
        [{"step": 0, "loss": math.nan}, {"step": 1, "loss": math.inf}, {"step": 2, "loss": 1.0}],
        [{"step": s, "loss": math.nan if s < 190 else 1.0} for s in range(200)],
        [{"step": s, "loss": 10.0**s} for s in range(38)],
    ],
    ids=["nothing", "no series", "one point", "one nan", "nan and inf", "mostly nan", "diverged"],
)
@pytest.mark.filterwarnings("error")
def test_odd_rows_still_make_a_picture(tmp_path, rows):
    curves(rows, tmp_path / "c.png")
    assert ink(tmp_path / "c.png") > 0


def test_non_finite_values_are_marked_where_they_happened(tmp_path, figures):
    curves([{"step": s, "loss": math.nan if s in (3, 7) else 1.0} for s in range(10)],
           tmp_path / "c.png")  # fmt: skip
    (marks,) = [line for line in figures[0].axes[0].lines if line.get_color() == plots.BAD]
    assert list(marks.get_xdata()) == [3, 7]


def test_noise_is_averaged_but_schedules_are_not():
    steps = np.arange(1000)
    noise = np.where(steps % 2, 1.0, -1.0)
    noise[500] = np.nan
    smooth = plots._moving_average(5 + noise)
    assert np.abs(smooth - 5).max() < 0.2 and np.isfinite(smooth).all()
    warmup = np.minimum(steps / 100, 1.0)
    assert plots._moving_average(warmup) is None
    assert plots._moving_average(noise[:20]) is None
