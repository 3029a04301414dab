"""Random parts of a source, and sources some of whose images cannot be read."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common.augment import RandomResizedCrop
from common.data import (
    ImageError,
    LoaderSpec,
    array_source,
    eval_batches,
    open_source,
    read,
    subset,
    train_batches,
)

BAD = ("a/04.jpg", "b/07.png", "b/09.png")
CROP = RandomResizedCrop(8)


# --- parts ----------------------------------------------------------------------------------------


def numbered(n=1000):
    return array_source(image=np.arange(n), label=np.arange(n) * 10 // n)  # sorted by class


def values(source, key="image"):
    return [int(record[key]) for record in read(source, range(len(source)))]


def test_a_part_of_a_sorted_source_holds_every_class():
    counts = np.bincount(values(subset(numbered(), 300), "label"), minlength=10)
    assert len(subset(numbered(), 300)) == 300 and counts.min() > 15 and counts.max() < 50


def test_a_part_lies_in_every_larger_one_and_repeats_nothing():
    part = subset(numbered(), 300)
    large = values(part)
    assert values(subset(numbered(), 100)) == large[:100] and len(set(large)) == 300
    assert values(subset(numbered(), 100, seed=1)) != large[:100]
    assert [int(part[i]["image"]) for i in range(300)] == large


def test_all_of_a_source_is_the_source():
    source = numbered(5)
    assert (
        subset(source, None) is source
        and subset(source, 5) is source
        and subset(source, 9) is source
    )
    assert len(subset(numbered(1), 1)) == 1
    with pytest.raises(ValueError, match="n=-1"):
        subset(source, -1)


# --- images that cannot be read -------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """40 images; those of `BAD` have good headers and then less than these promise."""
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / ("ab"[i % 2]) / f"{i:02}.{('jpg', 'png')[i % 2]}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    for name in BAD:
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 4 // 5])
    png = (tmp_path / "b" / "11.png").read_bytes()
    at = png.index(b"IDAT") + 10
    (tmp_path / "b" / "11.png").write_bytes(png[:at] + bytes([png[at] ^ 255]) + png[at + 1 :])
    return tmp_path


def batches(source, n=8, start=0, **spec):
    stream = train_batches(source, LoaderSpec(10, seed=1, **spec), transform=CROP, start_step=start)
    try:
        return list(itertools.islice(stream, n))
    finally:
        stream.close()


def assert_same(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.multiproc)])
def test_a_bad_image_ends_the_stream_with_one_line(folder, workers):
    with pytest.raises(ImageError) as error:
        batches(open_source(f"folder:{folder}"), workers=workers)
    line = str(error.value)
    assert any(f"{folder}/{name} cannot be decoded (" in line for name in {*BAD, "b/11.png"}), line
    assert "--config.data.skip_bad=true" in line and "\n" not in line


def test_a_skipped_image_is_named_and_counted_once(folder, caplog):
    source = open_source(f"folder:{folder}", skip_bad=True)
    got = batches(source, 12)  # three epochs
    assert {source.paths[i] for i in source.skipped} == {*BAD, "b/11.png"}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4 and all("skipped: " in line and "\n" not in line for line in lines)
    assert all(batch["image"].shape == (10, 8, 8, 3) for batch in got)


def test_skipping_is_a_function_of_the_files(folder):
    """Whatever was met before: a resumed stream, other processes, and a second epoch see the same."""
    whole = batches(open_source(f"folder:{folder}", skip_bad=True))
    assert_same(batches(open_source(f"folder:{folder}", skip_bad=True), 3, start=5), whole[5:])
    halves = [
        batches(open_source(f"folder:{folder}", skip_bad=True), held=((start, start + 5),))
        for start in (0, 5)
    ]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves)]
    assert_same(joined, whole)


@pytest.mark.slow
@pytest.mark.multiproc
def test_workers_skip_the_same_and_report_it(folder, caplog):
    source = open_source(f"folder:{folder}", skip_bad=True)
    whole = batches(open_source(f"folder:{folder}", skip_bad=True))
    caplog.clear()
    assert_same(batches(source, workers=2), whole)
    assert len(source.skipped) == len(caplog.records) == 4


def test_only_the_rows_of_bad_images_change(folder):
    skipping = batches(open_source(f"folder:{folder}", skip_bad=True), 4)
    for name in {*BAD, "b/11.png"}:
        Image.new("RGB", (32, 32)).save(folder / name)
    repaired = batches(open_source(f"folder:{folder}"), 4)
    differ = [
        (x["image"][i] != y["image"][i]).any()
        for x, y in zip(skipping, repaired)
        for i in range(10)
    ]
    assert sum(differ) == 4


def test_a_bad_image_is_no_test_image(folder):
    source = open_source(f"folder:{folder}", skip_bad=True)
    got = list(eval_batches(subset(source, 39), 16, transform=CROP))
    weight = np.concatenate([batch["weight"] for batch in got])
    assert weight.sum() == 39 - len(source.skipped) and len(source.skipped) >= 3
    with pytest.raises(ImageError, match="cannot be decoded"):
        list(eval_batches(open_source(f"folder:{folder}"), 16, transform=CROP))


def test_a_set_of_bad_images_is_refused(folder):
    for path in folder.glob("*/*"):
        path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ImageError, match="neither can 64 others"):
        batches(open_source(f"folder:{folder}", skip_bad=True), 1)


def test_a_file_that_vanished_is_not_skipped(folder):
    source = open_source(f"folder:{folder}", skip_bad=True)
    for path in folder.glob("*/*"):
        path.unlink()
    with pytest.raises(ImageError, match="cannot be read now: No such file"):
        batches(source, 1)


def test_settings_of_a_stream_do_not_tell_who_skipped(folder):
    """A stream that skips can be resumed after the rest of the bad files was met."""
    spec = replace(LoaderSpec(10, seed=1), workers=0)
    source = open_source(f"folder:{folder}", skip_bad=True)
    before = source.identity
    list(itertools.islice(train_batches(source, spec, transform=CROP), 4))
    assert source.identity == before
