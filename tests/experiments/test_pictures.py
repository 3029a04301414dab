"""The report's picture holds what it is given."""

import json

import matplotlib.image
import numpy as np
import pytest

from common.data import array_source
from experiments.jepa.configs.scenes import get_config
from experiments.jepa.pictures import _with_masks, report_picture
from experiments.jepa.settings import resolve
from jepa.masks import sample

ACCURACY = {
    kind: {"count": (0.3, 0.01), "shape": (0.5, float("nan"))}
    for kind in ("jepa", "untrained", "pixels")
}


@pytest.mark.slow
def test_draws_with_and_without_curves(tmp_path):
    settings = resolve(get_config("").to_dict())
    images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    source = array_source(image=images, count=np.arange(6))
    run = tmp_path / "seed0"
    run.mkdir()
    rows = [{"step": s, "eval/knn_count": 0.1 * s} for s in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report_picture(
        tmp_path / "a.png", settings, source, ACCURACY, {"count": 0.2, "shape": 0.4}, tmp_path
    )
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0.1


def test_context_shows_the_image_and_nothing_else():
    settings = resolve(get_config("").to_dict())
    masks = sample(settings.recipe.masks, 0, np.arange(1))
    black = np.zeros((64, 64, 3), np.uint8)
    shown = _with_masks(black, masks, 0, patch=8)
    cells = shown.reshape(8, 32, 8, 32, 3)[:, 16, :, 16]  # the middle of every patch
    dark = {int(i) for i in np.flatnonzero((cells < 0.5).all(-1).ravel())}
    assert dark == set(masks.context[0].tolist())
