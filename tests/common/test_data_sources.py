import os
import pickle  # noqa: TID251  (what workers do, to objects of our own)
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from common.augment import RandomResizedCrop
from common.data import (
    LoaderSpec,
    array_source,
    eval_batches,
    open_source,
    overlapping,
    train_batches,
)
from common.data import folder as folder_module
from common.data import sources as sources_module
from common.data.__main__ import main

ROOT = Path(__file__).parents[2]


# --- sources --------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"has train and val; got split 'train\[:9"):
        open_source(f"folder:{tmp_path}", "train[:90%]")
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
    assert "--config.data.skip_bad=true" in str(error.value)
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


# --- TFDS -----------------------------------------------------------------------------------------

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
        sources_module, "decode_image", lambda raw, name: (decoded.append(raw), real(raw, name))[1]
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [["digits"], pytest.param(["cifar10", "mnist"], marks=real_data)], ids=str
)
def test_reading_needs_no_tensorflow(names):
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_TENSORFLOW), *names]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "fine", done.stderr


# --- command line ---------------------------------------------------------------------------------


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


def test_sets_that_share_records_are_known_by_their_names():
    digits, test = open_source("digits"), open_source("digits", "test")
    assert overlapping(digits, open_source("digits", skip_bad=True))
    assert not overlapping(digits, test)
    assert not overlapping(digits, array_source(image=np.zeros((3, 1))))


@real_data
@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("train", "test", False),
        ("train", "train", True),
        ("train[:90%]", "train[90%:]", False),
        ("train[:90%]", "train[-7000:]", True),
        ("test[:10]", "train[:10]", False),
    ],
)
def test_slices_that_overlap_are_known(one, other, shared):
    assert overlapping(open_source("mnist", one), open_source("mnist", other)) == shared
    assert not overlapping(open_source("mnist", one), open_source("cifar10", one))


def test_class_labels_are_labels_and_numbers_are_not():
    """Where a set says which of its integers are classes; and where it does not, by their names."""
    from tensorflow_datasets.core import features as f

    image, number = f.Image(shape=(2, 2, 3)), f.Scalar(np.int64)
    told = {"image": image, "label": f.ClassLabel(num_classes=3), "seen": number, "id": number}
    assert sources_module._labels(told) == ("label",)
    untold = {"image": image, "count": number, "image_id": number, "index": number}
    assert sources_module._labels(untold) == ("count",)
