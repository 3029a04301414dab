import gc
import itertools
import json
import os
import pickle  # noqa: TID251  (what workers do, to objects of our own)
import subprocess
import sys
import textwrap
import threading
import time
import types
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image
from sklearn.datasets import load_digits

from common.augment import CenterCrop, RandomResizedCrop
from common.data import (
    LoaderSpec,
    array_source,
    check_fingerprint,
    eval_batches,
    fingerprint,
    open_source,
    prefetch_to_device,
    train_batches,
)
from common.data import folder as folder_module
from common.data import sources as sources_module
from common.data.__main__ import main

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


# --- training batches -------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_split_the_batch_of_one(processes):
    source, spec = small_source(), LoaderSpec(batch=8, seed=3)
    whole = take(14, source, spec)  # 14 * 8 rows: more than two epochs
    parts = [
        take(14, source, replace(spec, process=p, num_processes=processes))
        for p in range(processes)
    ]
    joined = [
        {key: np.concatenate([part[t][key] for part in parts]) for key in whole[0]}
        for t in range(14)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    source, spec = small_source(), LoaderSpec(batch=8, seed=3, process=1, num_processes=2)
    expected = take(12, source, spec)[5:]  # resumed in the middle too
    assert_equal(take(7, source, replace(spec, workers=workers), start_step=5), expected)


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_prefetch_changes_nothing(prefetch):
    source, spec = small_source(), LoaderSpec(batch=8, seed=3)
    assert_equal(take(9, source, replace(spec, prefetch=prefetch)), take(9, source, spec))


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


def test_augmentation_is_fresh_for_every_row_and_seed():
    spec = LoaderSpec(batch=10, seed=0)
    draws = [b["draw"] for b in take(30, small_source(10), spec)]
    draws += [b["draw"] for b in take(30, small_source(10), replace(spec, seed=1))]
    assert len(np.unique(np.concatenate(draws))) == 600


def test_augmentation_draws_are_uniform_across_rows():
    draws = np.concatenate([b["draw"] for b in take(400, small_source(), LoaderSpec(10, seed=5))])
    counts, _ = np.histogram(draws, 20, (0, 1))
    assert ((counts - 200) ** 2 / 200).sum() < 50  # chi-squared, 19 degrees: p = 1e-4
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / 4000**0.5


def test_rows_are_positions_in_the_endless_stream():
    spec = LoaderSpec(batch=6, seed=0, process=1, num_processes=3)
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
        ({"batch": 6, "num_processes": 4}, "6 does not divide over 4"),
        ({"batch": 0}, "positive"),
        ({"process": 2, "num_processes": 2}, r"\[0, 2\), got 2"),
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


@pytest.mark.multiproc
def test_workers_survive_a_program_started_with_dash_m(tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(MODULE))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "program"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 5  # printed once: a worker does not run main again


# --- evaluation -------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), per_process=st.integers(1, 7), processes=st.sampled_from([1, 2, 4]))
def test_evaluation_weights_sum_to_n_and_shapes_agree(n, per_process, processes):
    source, batch = small_source(n), per_process * processes
    runs = [
        list(eval_batches(source, batch, process=p, num_processes=processes))
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
        list(eval_batches(source, 8, transform=Augment(), process=p, num_processes=2))
        for p in (0, 1)
    ]
    for t, batch in enumerate(whole):
        joined = np.concatenate([halves[0][t]["draw"], halves[1][t]["draw"]])
        np.testing.assert_array_equal(joined, batch["draw"])


def test_evaluation_with_a_crop_keeps_order():
    batches = list(eval_batches(small_source(10), 4, transform=CenterCrop(8, 8)))
    assert [b["image"].shape for b in batches] == [(4, 8, 8, 3)] * 3
    assert np.concatenate([b["label"] for b in batches])[:10].tolist() == list(range(10))


# --- fingerprints -----------------------------------------------------------------------------


def test_a_fingerprint_survives_json_and_ignores_what_may_change():
    source, spec = small_source(), LoaderSpec(8, seed=3)
    saved = json.loads(json.dumps(fingerprint(source, spec, RandomResizedCrop(32), None)))
    other = replace(spec, workers=3, process=1, num_processes=2, prefetch=9)
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


# --- sources ----------------------------------------------------------------------------------


def test_array_source_wants_equal_lengths():
    with pytest.raises(ValueError, match=r"'image': 3.*'label': 2"):
        array_source(image=np.zeros((3, 1)), label=np.zeros(2))
    with pytest.raises(ValueError, match="at least 1"):
        array_source(image=np.zeros((0, 1)))


def test_digits_split_is_disjoint_complete_and_stable():
    train, test = open_source("digits"), open_source("digits", "test")
    assert len(train) + len(test) == 1797 and len(test) == 359
    labels = load_digits().target
    assert [test[i]["label"] for i in range(len(test))] == labels[4::5].tolist()
    assert [train[i]["label"] for i in range(5)] == [*labels[:4], labels[5]]
    assert train[0]["image"].shape == (8, 8, 3) and train[0]["image"].dtype == np.uint8
    assert max(train[i]["image"].max() for i in range(100)) == 255
    with pytest.raises(ValueError, match="train and test, got 'val'"):
        open_source("digits", "val")


def save_image(path, color=(10, 20, 30), mode="RGB", size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def test_a_folders_sub_folders_are_sorted_classes(tmp_path):
    save_image(tmp_path / "dog" / "b.png")
    save_image(tmp_path / "dog" / "deep" / "a.jpg")
    save_image(tmp_path / "cat" / "z.png", 77, mode="L")
    (tmp_path / "cat" / ".DS_Store").write_text("ignored")
    source = open_source(f"folder:{tmp_path}")
    assert source.classes == ("cat", "dog") and len(source) == 3
    assert [source[i]["label"] for i in range(3)] == [0, 1, 1]
    np.testing.assert_array_equal(source[0]["image"], np.full((5, 6, 3), 77))  # grey to RGB
    assert pickle.loads(pickle.dumps(source))[2]["image"].shape == (5, 6, 3)


def test_a_flat_folder_has_no_labels(tmp_path):
    save_image(tmp_path / "1.png")
    assert open_source(f"folder:{tmp_path}")[0].keys() == {"image"}


def test_split_folders_share_the_classes_of_train(tmp_path):
    for path in ("train/a", "train/b", "train/c", "val/b"):
        save_image(tmp_path / path / "1.png")
    val = open_source(f"folder:{tmp_path}", "val")
    assert val.classes == ("a", "b", "c") and val[0]["label"] == 1
    with pytest.raises(ValueError, match="has train and val; got split 'test'"):
        open_source(f"folder:{tmp_path}", "test")
    save_image(tmp_path / "val" / "d" / "1.png")
    with pytest.raises(ValueError, match=r"lacks: \['d'\]"):
        open_source(f"folder:{tmp_path}", "val")


def test_bad_files_are_counted_and_named_in_one_error(tmp_path):
    save_image(tmp_path / "a" / "good.png")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    save_image(tmp_path / "stray.png")
    with pytest.raises(ValueError, match="3 of 4 files") as error:
        open_source(f"folder:{tmp_path}")
    assert all(name in str(error.value) for name in ("notes.txt", "cut.png", "stray.png"))
    assert "skip_bad=True" in str(error.value)
    with pytest.warns(UserWarning, match="3 of 4 files"):
        source = open_source(f"folder:{tmp_path}", skip_bad=True)
    assert source.paths == (os.path.join("a", "good.png"),)


def test_a_long_list_of_bad_files_is_cut(tmp_path):
    save_image(tmp_path / "ok.png")
    for i in range(25):
        (tmp_path / f"{i:02}.txt").write_text("")
    with pytest.raises(ValueError, match="25 of 26 files") as error:
        open_source(f"folder:{tmp_path}")
    assert "and 15 more" in str(error.value) and "24.txt" not in str(error.value)


def test_slow_checks_show_progress(tmp_path, monkeypatch):
    shown = []
    real = folder_module.Progress.update
    monkeypatch.setattr(
        folder_module.Progress,
        "update",
        lambda self, task, **kw: (shown.append(kw["visible"]), real(self, task, **kw)),
    )
    save_image(tmp_path / "1.png")
    open_source(f"folder:{tmp_path}")
    monkeypatch.setattr(folder_module, "_QUIET_S", -1)
    open_source(f"folder:{tmp_path}")
    assert shown == [False, True]


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        open_source(f"folder:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_source(f"folder:{tmp_path / 'nowhere'}")


# --- TFDS -------------------------------------------------------------------------------------

real_data = pytest.mark.skipif(
    not (Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")) / "cifar10").is_dir(),
    reason="needs TFDS_DATA_DIR with cifar10 and mnist",
)


def test_missing_data_name_the_command_and_the_variable(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        open_source("cifar10", data_dir=str(tmp_path))
    assert f"python -m common.data prepare cifar10 --data_dir={tmp_path}" in str(error.value)
    assert "TFDS_DATA_DIR" in str(error.value)


def test_the_variable_is_read_when_a_set_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        open_source("mnist")


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown dataset 'cifar_ten'"):
        open_source("cifar_ten", data_dir=str(tmp_path))


@real_data
@pytest.mark.parametrize(("name", "n", "side"), [("cifar10", 10_000, 32), ("mnist", 10_000, 28)])
def test_tfds_records(name, n, side):
    source = open_source(name, "test")
    assert len(source) == n and len(open_source(name, "test[:5%]")) == n // 20
    record = source[n - 1]
    assert record.keys() == {"image", "label"} and isinstance(record["label"], int)
    assert record["image"].shape == (side, side, 3) and record["image"].dtype == np.uint8
    again = pickle.loads(pickle.dumps(source))[n - 1]
    np.testing.assert_array_equal(again["image"], record["image"])
    with pytest.raises(ValueError, match="read-only"):
        record["image"][:] = 0  # it may be handed out again
    with pytest.raises(ValueError, match=r"\['test', 'train'\], got 'val'"):
        open_source(name, "val")


@real_data
def test_a_small_set_is_decoded_once_and_a_large_one_every_time(monkeypatch):
    decoded = []
    real = sources_module.decode_image
    monkeypatch.setattr(
        sources_module, "decode_image", lambda raw: (decoded.append(raw), real(raw))[1]
    )
    for limit, expected in ((10**9, 3), (1000, 5)):
        monkeypatch.setattr(sources_module, "CACHE_BYTES", limit)
        source = open_source("cifar10", "test")
        first = source.__getitems__([5, 9])
        second = source.__getitems__([9, 2, 5])
        np.testing.assert_array_equal(first[0]["image"], second[2]["image"])
        assert len(decoded) == expected
        decoded.clear()


@real_data
def test_real_pipeline_feeds_augmented_batches():
    source = open_source("cifar10")
    batch = next(train_batches(source, LoaderSpec(16, seed=0), transform=RandomResizedCrop(24)))
    assert batch["image"].shape == (16, 24, 24, 3) and batch["image"].std() > 20


WITHOUT_TENSORFLOW = """
    import sys

    class Hide:  # a finder for which TensorFlow is not installed
        def __init__(self, finder):
            self.finder = finder
        def find_spec(self, name, *args):
            if name.split(".")[0] not in ("tensorflow", "tensorflow_cpu"):
                return self.finder.find_spec(name, *args)
        def __getattr__(self, name):
            return getattr(self.finder, name)

    sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
    from common.data import LoaderSpec, open_source, train_batches
    for name in sys.argv[1:]:
        batch = next(train_batches(open_source(name), LoaderSpec(4, seed=0)))
        assert batch["image"].shape[0] == 4
    assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
    print("fine")
"""


@pytest.mark.parametrize(
    "names", [["digits"], pytest.param(["cifar10", "mnist"], marks=real_data)], ids=str
)
def test_reading_needs_no_tensorflow(names):
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_TENSORFLOW), *names]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "fine", done.stderr


# --- device prefetch --------------------------------------------------------------------------


def on_one_device():
    return NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))


def batches_of(n):
    for i in range(n):
        yield {"x": np.full((4, 2), i, np.float32)}


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "prefetch_to_device"]


def test_prefetch_keeps_order_and_ends():
    out = list(prefetch_to_device(batches_of(7), on_one_device()))
    assert [float(b["x"][0, 0]) for b in out] == list(range(7))
    assert all(isinstance(b["x"], jax.Array) for b in out)
    assert not prefetch_threads()


def test_prefetch_asks_for_a_sharding_per_leaf():
    ranks = []

    def sharding(array):
        ranks.append(array.ndim)
        return on_one_device()

    batch = {"image": np.zeros((2, 4, 4, 3)), "label": np.zeros(2)}
    out = next(prefetch_to_device(iter([batch]), sharding))
    assert sorted(ranks) == [1, 4] and out["image"].shape == (2, 4, 4, 3)


def test_prefetch_raises_after_the_good_batches():
    def failing():
        yield from batches_of(2)
        raise OSError("disk gone")

    it = prefetch_to_device(failing(), on_one_device())
    assert [float(next(it)["x"][0, 0]) for _ in range(2)] == [0, 1]
    for _ in range(2):  # and goes on raising, where it would otherwise wait for ever
        with pytest.raises(OSError, match="disk gone"):
            next(it)


def test_prefetch_runs_ahead_by_depth_and_no_further():
    drawn = []

    def counting():
        for i in itertools.count():
            drawn.append(i)
            yield {"x": np.zeros(1, np.float32)}

    with prefetch_to_device(counting(), on_one_device(), depth=3):
        deadline = time.monotonic() + 30
        while len(drawn) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(drawn) == 4  # three queued, one in the thread's hand
    with pytest.raises(ValueError, match="depth"):
        prefetch_to_device(counting(), on_one_device(), depth=0)


def test_closing_stops_the_thread_and_closes_the_source():
    source = train_batches(small_source(), LoaderSpec(4, seed=0))
    it = prefetch_to_device(source, on_one_device())
    next(it)
    it.close()
    it.close()
    assert not prefetch_threads()
    with pytest.raises(StopIteration):
        next(it)
    with pytest.raises(ValueError, match="closed"):
        next(source)


def test_an_abandoned_prefetcher_is_collected():
    it = prefetch_to_device(iter(itertools.cycle(batches_of(1))), on_one_device())
    next(it)
    del it
    gc.collect()
    assert not prefetch_threads()


# --- command line -----------------------------------------------------------------------------


def test_info_describes_a_folder(tmp_path, capsys):
    for path in ("train/a/1.png", "train/b/1.png", "val/a/1.png"):
        save_image(tmp_path / path)
    assert main(["info", f"folder:{tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "train 2, val 1" in out and "label: 0 to 1" in out and "[5, 6, 3]" in out


def test_info_of_missing_data_is_an_error_that_teaches(tmp_path, capsys):
    assert main(["info", "cifar10", f"--data_dir={tmp_path}"]) == 1
    assert "python -m common.data prepare cifar10" in capsys.readouterr().err


def test_prepare_asks_for_array_record(monkeypatch, tmp_path, capsys):
    calls = []
    info = types.SimpleNamespace(full_name="x/1.0.0")
    builder = types.SimpleNamespace(
        download_and_prepare=lambda: calls.append("prepared"), info=info, data_dir=tmp_path
    )

    def fake_builder(name, data_dir, **kwargs):
        calls.append((name, data_dir, kwargs))
        return builder

    monkeypatch.setattr("common.data.__main__.tfds_builder", fake_builder)
    assert main(["prepare", "x", "--data_dir=d"]) == 0
    assert calls == [("x", "d", {"file_format": "array_record"}), "prepared"]
    assert "x/1.0.0" in capsys.readouterr().out


def test_preparing_without_a_needed_tensorflow_says_so(monkeypatch, capsys):
    def needs_tensorflow():
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    builder = types.SimpleNamespace(download_and_prepare=needs_tensorflow)
    monkeypatch.setattr("common.data.__main__.tfds_builder", lambda *a, **k: builder)
    assert main(["prepare", "x"]) == 1
    assert "needs TensorFlow to prepare x" in capsys.readouterr().err


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m common.data prepare scenes" in capsys.readouterr().out


def test_scenes_keep_their_three_labels(tmp_path, capsys):
    scenes = pytest.importorskip("common.datasets.scenes.builder")
    scenes.prepare(tmp_path, train=12, test=4, progress=False)
    name = f"scenes/{scenes.scene_config(12, 4).name}"
    batch = next(eval_batches(open_source(name, "test", str(tmp_path)), 4))
    assert {"image", "count", "distance", "shape"} <= batch.keys()
    assert batch["image"].shape[-1] == 3 and batch["count"].dtype == np.int32
    assert main(["info", name, f"--data_dir={tmp_path}"]) == 0
    assert "train 12, test 4" in capsys.readouterr().out
