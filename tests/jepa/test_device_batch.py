"""Batches made inside the step: the host's in distribution, and each row by itself."""

import jax
import numpy as np
import pytest

from common.augment import RandomResizedCrop
from jepa.device_batch import DeviceBatch, sample
from jepa.masks import Masks, MaskSpec, assert_disjoint
from jepa.masks import sample as sample_on_host

CROP = RandomResizedCrop(16, flip=True)
SPECS = {
    "released": MaskSpec((16, 16)),
    "most draws fail": MaskSpec((8, 8), context_tokens=25),
    "oblong": MaskSpec((5, 9), target_scale=(0.1, 0.3), target_aspect=(0.5, 1.5), num_targets=2),
}


def used(spec: MaskSpec, masks: Masks) -> tuple[np.ndarray, np.ndarray]:
    """Patches in the context, and in any target: bool [B, N] each."""
    n = spec.grid[0] * spec.grid[1]
    one_hot = lambda indices: np.eye(n + 1, dtype=bool)[indices]  # noqa: E731
    target = one_hot(np.where(masks.target_valid, masks.targets, n)).any((1, 2))
    return one_hot(masks.context).any(1)[:, :n], target[:, :n]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_masks_are_distributed_as_the_hosts(spec):
    n = 2000
    host = sample_on_host(spec, 1, np.arange(n))
    draw = jax.jit(lambda keys: sample(spec, keys))
    ours = Masks(*map(np.asarray, draw(jax.random.split(jax.random.key(2), n))))
    assert_disjoint(ours)
    for a, b in zip(ours, host):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert (np.diff(ours.context, axis=1) > 0).all()
    for a, b in zip(used(spec, ours), used(spec, host)):  # each patch's share, then how many
        assert np.abs(a.mean(0) - b.mean(0)).max() < 5 * (2 * 0.25 / n) ** 0.5
        assert abs(a.sum(1).mean() - b.sum(1).mean()) < 0.02 * b.sum(1).mean()
    a, b = (m.target_valid.sum(-1).ravel() for m in (ours, host))
    apart = [(a <= v).mean() - (b <= v).mean() for v in np.union1d(a, b)]
    assert np.abs(apart).max() < 1.95 * (2 / a.size) ** 0.5


@pytest.mark.slow
def test_a_row_depends_on_seed_and_position_alone():
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    make = jax.jit(DeviceBatch(CROP, SPECS["most draws fail"], seed=3))
    whole = make(images, {"record": np.arange(12) % 5, "row": np.arange(12) + 70})
    part = make(images, {"record": np.arange(4, 7) % 5, "row": np.arange(4, 7) + 70})
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[4:7], b), whole, part)
    assert (np.asarray(whole["image"][0]) != whole["image"][5]).any()  # the same record, later


def test_what_the_device_does_not_make_is_refused():
    with pytest.raises(ValueError, match=r"masks.mode='paper'.*data.on_device=False"):
        DeviceBatch(CROP, MaskSpec((16, 16), "paper"), 0)
    with pytest.raises(ValueError, match="does not colour or blur"):
        DeviceBatch(RandomResizedCrop(16, blur=True), SPECS["released"], 0)
