"""The train loop takes whole global batches and no others."""

import pytest

from tests.common.line import batches, run


def test_a_batch_without_all_rows_is_refused_at_whatever_step(tmp_path):
    def cut(start):
        for step, batch in enumerate(batches(start), start):
            yield batch if step < 3 else batch | {"y": batch["y"][:4]}

    with pytest.raises(ValueError, match=r"batch\['y'\] has the shape \(4,\), but train\.batch=8"):
        run(tmp_path, 5, data=cut)
