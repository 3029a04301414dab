import itertools
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.augment import CenterCrop, RandomResizedCrop
from common.data import (
    LoaderSpec,
    array_source,
    check_fingerprint,
    eval_batches,
    fingerprint,
    open_source,
    train_batches,
)

ROOT = Path(__file__).parents[2]


def small_source(n=50, side=12):
    images = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    return array_source(image=images, label=np.arange(n))


@dataclass(frozen=True)
class Augment:
    """A crop, and the generator's raw numbers, so that equality covers both."""

    def __call__(self, record, rng):
        record = RandomResizedCrop(8)(record, rng)
        return {**record, "draw": rng.random(), "word": rng.integers(2**32, dtype=np.uint32)}


def add_rows(batch, rows):
    return {**batch, "rows": rows, "mask": rows[:, None] * np.arange(3)}


def take(n, source, spec, **kwargs):
    kwargs = {"transform": Augment(), "batch_transform": add_rows, **kwargs}
    batches = train_batches(source, spec, **kwargs)
    try:
        return list(itertools.islice(batches, n))
    finally:
        batches.close()


def assert_equal(xs, ys):
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)


# --- training batches -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "held",
    [((0, 4),), ((4, 8),), ((0, 8),), ((3, 4),), ((0, 2), (4, 6)), ((1, 2), (2, 3), (7, 8))],
)
def test_a_process_reads_the_rows_that_it_holds_of_the_batch_of_one(held):
    source, spec = small_source(), LoaderSpec(batch=8, seed=3)
    whole = take(14, source, spec)  # 14 * 8 rows: more than two epochs
    rows = np.concatenate([np.arange(*part) for part in held])
    wanted = [{key: array[rows] for key, array in batch.items()} for batch in whole]
    assert_equal(take(14, source, replace(spec, held=held)), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    source, spec = small_source(), LoaderSpec(batch=8, seed=3, held=((0, 1), (5, 8)))
    expected = take(12, source, spec)[5:]  # resumed in the middle too
    assert_equal(take(7, source, replace(spec, workers=workers), start_step=5), expected)


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_prefetch_changes_nothing(prefetch):
    source, spec = small_source(), LoaderSpec(batch=8, seed=3)
    assert_equal(take(9, source, replace(spec, prefetch=prefetch)), take(9, source, spec))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 40), n=st.integers(1, 30), batch=st.integers(1, 9))
def test_starting_at_a_step_equals_skipping_to_it(start, n, batch):
    source, spec = small_source(n), LoaderSpec(batch, seed=1, prefetch=0)
    assert_equal(take(3, source, spec, start_step=start), take(start + 3, source, spec)[start:])


class Counting:
    """A source that tells which records were read."""

    def __init__(self, n):
        self.n, self.reads = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.reads.append(i)
        return {"i": i}


def test_resuming_reads_no_skipped_record():
    source = Counting(1000)
    batches = train_batches(source, LoaderSpec(4, seed=0, prefetch=0), start_step=10**12)
    batch = next(batches)
    assert source.reads == batch["i"].tolist() and len(source.reads) == 4


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 70), batch=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_holds_every_record_once(n, batch, seed):
    batches = train_batches(Counting(n), LoaderSpec(batch, seed, prefetch=0))
    order = np.concatenate([next(batches)["i"] for _ in range(-(-3 * n // batch))])
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_have_unrelated_orders():
    def epochs(seed):
        batches = train_batches(Counting(500), LoaderSpec(500, seed, prefetch=0))
        return [next(batches)["i"] for _ in range(3)]

    orders = [order for seed in (0, 1, 2) for order in epochs(seed)]
    for a, b in itertools.combinations([*orders, np.arange(500)], 2):
        assert (a == b).sum() < 15  # one in expectation


@pytest.mark.slow
def test_augmentation_is_fresh_for_every_row_and_seed():
    spec = LoaderSpec(batch=10, seed=0)
    draws = [b["draw"] for b in take(30, small_source(10), spec)]
    draws += [b["draw"] for b in take(30, small_source(10), replace(spec, seed=1))]
    assert len(np.unique(np.concatenate(draws))) == 600


@pytest.mark.slow
def test_augmentation_draws_are_uniform_across_rows():
    draws = np.concatenate([b["draw"] for b in take(400, small_source(), LoaderSpec(10, seed=5))])
    counts, _ = np.histogram(draws, 20, (0, 1))
    assert ((counts - 200) ** 2 / 200).sum() < 50  # chi-squared, 19 degrees: p = 1e-4
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / 4000**0.5


def test_rows_are_positions_in_the_endless_stream():
    spec = LoaderSpec(batch=6, seed=0, held=((2, 4),))
    batches = take(2, small_source(), spec, start_step=7)
    np.testing.assert_array_equal(batches[0]["rows"], [44, 45])
    np.testing.assert_array_equal(batches[1]["rows"], [50, 51])
    assert batches[0]["rows"].dtype == np.int64


def test_labels_stay_with_their_images():
    source = small_source()
    images = source.arrays["image"]
    for batch in take(8, source, LoaderSpec(10, seed=0), transform=None, batch_transform=None):
        assert batch["label"].dtype == np.int32 and batch["image"].dtype == np.uint8
        np.testing.assert_array_equal(batch["image"], images[batch["label"]])


def test_a_transforms_error_reaches_the_caller():
    def broken(record, rng):
        raise RuntimeError(f"bad record {record['label']}")

    batches = train_batches(small_source(), LoaderSpec(4, seed=0), transform=broken)
    with pytest.raises(RuntimeError, match="bad record"):
        next(batches)


def test_images_of_different_sizes_name_the_remedy(tmp_path):
    for i, side in enumerate((8, 9)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{i}.png")
    batches = train_batches(open_source(f"folder:{tmp_path}"), LoaderSpec(2, seed=0))
    with pytest.raises(ValueError, match=r"'image': \(8, 8, 3\) and \(9, 9, 3\).*Resized"):
        next(batches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "positive, got 0"),
        ({"held": ()}, r"held=\(\) must be parts .* of the global batch's 8 rows"),
        ({"held": ((4, 9),)}, "8 rows"),
        ({"held": ((4, 4),)}, "must be parts"),
        ({"held": ((4, 8), (0, 4))}, "in order"),
        ({"held": ((0, 5), (4, 8))}, "without overlap"),
        ({"seed": -1}, "got -1"),
        ({"seed": 2**32}, "4294967296"),
        ({"workers": -1}, "workers"),
    ],
)
def test_impossible_specs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LoaderSpec(**{"batch": 8, "seed": 0, **change})


def test_a_negative_start_is_refused():
    with pytest.raises(ValueError, match="-1"):
        train_batches(small_source(), LoaderSpec(8, seed=0), start_step=-1)


MODULE = """
    import numpy as np
    from common.augment import RandomResizedCrop
    from common.data import LoaderSpec, array_source, train_batches

    def main():
        source = array_source(image=np.zeros((9, 8, 8, 3), np.uint8), label=np.arange(9))
        spec = LoaderSpec(4, seed=0, workers=1)
        batches = train_batches(source, spec, transform=RandomResizedCrop(8))
        print("labels", *next(batches)["label"])
        batches.close()

    if __name__ == "__main__":
        main()
"""


@pytest.mark.slow
@pytest.mark.multiproc
def test_workers_survive_a_program_started_with_dash_m(tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(MODULE))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "program"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 5  # printed once: a worker does not run main again


# --- evaluation -----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), per_process=st.integers(1, 7), processes=st.sampled_from([1, 2, 4]))
def test_evaluation_weights_sum_to_n_and_shapes_agree(n, per_process, processes):
    source, batch = small_source(n), per_process * processes
    runs = [
        list(eval_batches(source, batch, held=((p * per_process, (p + 1) * per_process),)))
        for p in range(processes)
    ]
    assert {len(run) for run in runs} == {-(-n // batch)}
    seen = []
    for step in zip(*runs, strict=True):
        for b in step:
            assert b["image"].shape == (per_process, 12, 12, 3)
            assert b["weight"].dtype == np.float32
            seen += b["label"][b["weight"] == 1].tolist()
    assert seen == list(range(n))
    assert sum(b["weight"].sum() for run in runs for b in run) == n


def test_evaluation_transforms_do_not_depend_on_processes():
    source = small_source(30)
    whole = list(eval_batches(source, 8, transform=Augment()))
    halves = [
        list(eval_batches(source, 8, transform=Augment(), held=held))
        for held in (((0, 4),), ((4, 6), (6, 8)))
    ]
    for t, batch in enumerate(whole):
        joined = np.concatenate([halves[0][t]["draw"], halves[1][t]["draw"]])
        np.testing.assert_array_equal(joined, batch["draw"])


def test_evaluation_with_a_crop_keeps_order():
    batches = list(eval_batches(small_source(10), 4, transform=CenterCrop(8, 8)))
    assert [b["image"].shape for b in batches] == [(4, 8, 8, 3)] * 3
    assert np.concatenate([b["label"] for b in batches])[:10].tolist() == list(range(10))


# --- fingerprints ---------------------------------------------------------------------------------


def test_a_fingerprint_survives_json_and_ignores_what_may_change():
    source, spec = small_source(), LoaderSpec(8, seed=3)
    saved = json.loads(json.dumps(fingerprint(source, spec, RandomResizedCrop(32), None)))
    other = replace(spec, workers=3, held=((4, 8),), prefetch=9)
    check_fingerprint(saved, fingerprint(source, other, RandomResizedCrop(32)))


@pytest.mark.parametrize(
    ("now", "key", "values"),
    [
        (lambda s, p: fingerprint(s, replace(p, seed=4), "a"), "seed", ("3", "4")),
        (lambda s, p: fingerprint(s, replace(p, batch=16), "a"), "global_batch", ("8", "16")),
        (lambda s, p: fingerprint(s, p, "b"), "transforms", ("a", "b")),
        (lambda s, p: fingerprint(small_source(49), p, "a"), "length", ("50", "49")),
        (lambda s, p: fingerprint(open_source("digits"), p, "a"), "name", ("arrays", "digits")),
    ],
)
def test_other_data_are_refused_showing_both_sides(now, key, values):
    source, spec = small_source(), LoaderSpec(8, seed=3)
    with pytest.raises(ValueError, match=f"{key}: saved .*{values[0]}.*now .*{values[1]}"):
        check_fingerprint(fingerprint(source, spec, "a"), now(source, spec))


def test_a_fingerprint_sees_a_changed_pixel():
    source = small_source()
    images = source.arrays["image"].copy()
    images[49, 11, 11, 2] ^= 1
    other = array_source(image=images, label=source.arrays["label"])
    with pytest.raises(ValueError, match="crc32"):
        check_fingerprint(*(fingerprint(s, LoaderSpec(8, seed=0)) for s in (source, other)))


def test_transforms_without_a_stable_name_are_refused():
    class Nameless:
        def __call__(self, record, rng):
            return record

    with pytest.raises(ValueError, match="frozen dataclass"):
        fingerprint(small_source(), LoaderSpec(8, seed=0), Nameless())
