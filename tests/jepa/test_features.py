"""Features: extracted in place, kept on the host where they are large, and probed where they have labels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa import probe
from jepa.probe import Features
from tests.jepa.test_probe import HIGHEST_BITS, SPEC, clouds, encoder, image_batches

slow = pytest.mark.slow


# Features that stay on the host


@pytest.mark.slow
@pytest.mark.parametrize(
    ("standardize", "rotate"),
    [(True, True), *[pytest.param(*pair, marks=slow) for pair in ((True, False), (False, True))]],
)
def test_features_that_stay_on_the_host_give_the_same_probe(standardize, rotate):
    train, y, test, test_y = clouds()
    spec = dataclasses.replace(SPEC, min_steps=20, standardize=standardize, rotate=rotate)
    resident = probe.linear_probe(train, y, test, test_y, 3, spec)
    streamed_spec = dataclasses.replace(spec, device_bytes=12 * 4 * 200)  # chunks of 50 rows
    streamed = probe.linear_probe(train, y, test, test_y, 3, streamed_spec)
    np.testing.assert_allclose(streamed.grid, resident.grid, atol=1.01 / 45)  # a row of 45
    assert streamed.accuracy == pytest.approx(resident.accuracy, abs=1.01 / 450)


def test_heads_that_come_from_the_host_equal_those_of_the_device():
    train, y, test, test_y = clouds()
    spec = dataclasses.replace(SPEC, min_steps=30)
    args = jnp.asarray(y), np.arange(len(y)), [(1e-2, 0.1)], 3
    on_device, _ = probe._on_axes(train, test, spec)
    small = dataclasses.replace(spec, device_bytes=12 * 4 * 400)  # a step of 128 rows at a time
    on_host, others = probe._on_axes(train, test, small)
    np.testing.assert_allclose(on_host.take(np.arange(len(y))), on_device, **HIGHEST_BITS)
    assert len(on_host) == len(train) and others.features_ID is test
    one, two = (probe._fit(x, *args, spec, None, "") for x in (on_device, on_host))
    np.testing.assert_allclose(two["w"], one["w"], rtol=1e-3, atol=1e-4)
    rows = np.arange(len(y))
    np.testing.assert_array_equal(
        probe._accuracy(two, on_host, args[0], rows), probe._accuracy(one, on_device, args[0], rows)
    )


@slow
def test_no_more_than_a_part_of_such_features_is_on_the_device(monkeypatch):
    sizes = []
    real = probe.HostRows.take
    monkeypatch.setattr(
        probe.HostRows, "take", lambda self, rows: (sizes.append(len(x := real(self, rows))), x)[1]
    )
    train, y, test, test_y = clouds()
    spec = dataclasses.replace(SPEC, min_steps=20, batch=32, device_bytes=12 * 4 * 200)
    probe.linear_probe(train, y, test, test_y, 3, spec)
    assert sizes and max(sizes) <= 50


@slow
def test_heads_that_do_not_fit_at_once_are_trained_in_groups(monkeypatch):
    train, y, test, test_y = clouds()
    spec = dataclasses.replace(SPEC, min_steps=20)
    whole = probe.linear_probe(train, y, test, test_y, 3, spec)
    monkeypatch.setattr(probe, "_HEAD_BYTES", 16 * 12 * 3)  # one at a time
    parts = probe.linear_probe(train, y, test, test_y, 3, spec)
    np.testing.assert_allclose(parts.grid, whole.grid, atol=1.01 / 45)
    assert parts.grid.shape == whole.grid.shape == (2, 2)


def test_extract_writes_in_place_and_refuses_more_images_than_rows():
    exact, roomy = (
        probe.extract(encoder, image_batches(), labels=("label", "count"), rows=rows)
        for rows in (10, 12)
    )
    jax.tree.map(np.testing.assert_array_equal, exact, roomy)
    assert len(exact.last) == len(exact.labels["count"]) == 10
    with pytest.raises(ValueError, match="rows=9"):
        probe.extract(encoder, image_batches(), rows=9)


# Labels


def test_rows_without_a_label_are_left_out():
    train, y, test, test_y = clouds()
    spec = dataclasses.replace(SPEC, min_steps=20)
    none = np.arange(len(y)) % 4 == 0

    def features(x, labels):
        return Features(x, x, {"label": labels, "none": np.full_like(labels, -1)})

    some = probe.probe_all(
        features(train, np.where(none, -1, y)), features(test, np.where(none, -1, test_y)), spec
    )
    alone = probe.probe_all(
        features(train[~none], y[~none]), features(test[~none], test_y[~none]), spec
    )
    assert some.keys() == {"label", "label/last", "label/last4"}
    assert some["label"].accuracy == alone["label"].accuracy


def test_label_sets_that_cannot_be_probed_have_a_reason():
    def features(**labels):
        n = len(next(iter(labels.values())))
        return Features(np.zeros((n, 1)), np.zeros((n, 1)), labels)

    n = np.arange(2000, dtype=np.int32)
    train = features(
        a=n % 3,
        few=np.where(n < 5, n, -1),
        number=n,
        large=n % 2 * 10**6,
        one=n % 2,
        two=n % 3,
        same=np.where(n % 2, 4, -1),
    )
    test = features(a=n % 3, few=n % 3, number=n, large=n % 2, one=n * 0 - 1, same=n % 3)
    names, others = probe.probable_labels(train, test, least=20)
    assert names == ("a",) and others.keys() == {"few", "number", "large", "one", "two", "same"}
    assert others["same"] == "all 1,000 training images are of one class (4)"
    assert "only 5 training images" in others["few"] and "of 20 or more" in others["few"]
    assert "number the images" in others["number"]
    assert "no test image" in others["one"] and "no test image" in others["two"]
