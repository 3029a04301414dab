"""The train loop takes whole global batches and no others, and its rows say how fast it was."""

import pytest

from common import flops
from common.writers import read_metrics
from tests.common.line import batches, run


def test_a_batch_without_all_rows_is_refused_at_whatever_step(tmp_path):
    def cut(start):
        for step, batch in enumerate(batches(start), start):
            yield batch if step < 3 else batch | {"y": batch["y"][:4]}

    with pytest.raises(ValueError, match=r"batch\['y'\] has the shape \(4,\), but train\.batch=8"):
        run(tmp_path, 5, data=cut)


def test_rows_have_the_utilisation_where_the_peak_of_the_chip_is_known(tmp_path, monkeypatch):
    monkeypatch.setitem(flops.PEAK_FLOPS, "cpu", 1e6)
    run(tmp_path, 3, log_every=1)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "images_per_second" in row]
    products = 2 * 2 * 8 * 4  # x w, and its gradient x' e: 8 rows of 4
    for row in rows:
        seconds = 8 / row["images_per_second"]
        assert row["mfu"] == pytest.approx(products / (seconds * 2 * 1e6))
    assert rows
