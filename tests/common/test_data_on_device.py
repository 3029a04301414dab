"""A training set on the device: the loader's records in the loader's order, and what is refused by name."""

import itertools

import jax
import numpy as np
import pytest

from common.data import LoaderSpec, array_source, drawn_records, images_on_device, train_batches
from common.mesh import MeshSpec, make_mesh

MESH = make_mesh(MeshSpec(fsdp=2), jax.devices()[:2])
IMAGES = np.random.default_rng(0).integers(0, 256, (37, 6, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize(("held", "start"), [(None, 0), (((2, 4), (6, 8)), 3)])
def test_a_step_draws_the_records_that_the_loader_reads(held, start):
    source = array_source(image=IMAGES)
    spec = LoaderSpec(8, seed=5, held=held)
    on_device = np.asarray(images_on_device(source, MESH))
    drawn = drawn_records(source, spec, start)
    for batch, d in itertools.islice(zip(train_batches(source, spec, start_step=start), drawn), 12):
        np.testing.assert_array_equal(on_device[d["record"]], batch["image"])
    assert d["row"].tolist() == [
        (start + 11) * 8 + r for a, b in held or [(0, 8)] for r in range(a, b)
    ]


def test_images_of_two_sizes_and_a_set_that_does_not_fit_are_refused(monkeypatch):
    class TwoSizes:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return {"image": IMAGES[0] if i < 2 else IMAGES[0, :3]}

    with pytest.raises(ValueError, match=r"data.on_device=True: image 0 .*\(6, 5, 3\) and image 2"):
        images_on_device(TwoSizes(), MESH)
    monkeypatch.setattr("common.data.on_device.device_memory", lambda: {"limit": IMAGES.nbytes})
    with pytest.raises(ValueError, match=r"37 images of 90 bytes .*set data.on_device=False"):
        images_on_device(array_source(image=IMAGES), MESH)


def test_rows_end_where_their_numbers_would():
    spec = LoaderSpec(8, seed=0)
    with pytest.raises(OverflowError, match=r"data.on_device=False"):
        next(drawn_records(array_source(image=IMAGES), spec, 2**28))
