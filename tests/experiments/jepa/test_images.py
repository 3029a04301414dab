"""What I-JEPA's jobs evaluate on: which images, with which labels, and what they refuse before they train."""

import logging
import re

import jax
import numpy as np
import pytest
from PIL import Image

from common.augment import CenterCrop
from common.config import ConfigError
from common.data import array_source, open_source
from common.mesh import MeshSpec, make_mesh
from experiments import launch
from experiments.jepa import data as jepa_data
from experiments.jepa import probes as jepa_eval
from experiments.jepa.configs import in22k_vitg16, in22k_vith14
from experiments.jepa.configs.scenes import get_config
from experiments.jepa.pretrain import open_run
from experiments.jepa.settings import resolve
from experiments.metaopt.tasks import mlp as metaopt_mlp

CROP = CenterCrop(32, 32)


def digits_by_class(split="train", **more):
    """scikit-learn's digits as a folder gives them: sorted by class."""
    digits = open_source("digits", split)
    order = np.argsort(digits.arrays["label"], kind="stable")
    arrays = {name: array[order] for name, array in digits.arrays.items()}
    return array_source(**arrays, **{name: make(arrays["label"]) for name, make in more.items()})


def settings(**changes):
    config = get_config("smoke")
    config.update_from_flattened_dict(changes)
    return resolve(config.to_dict(), 1000)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshSpec(fsdp=1), devices=jax.devices()[:1])


@pytest.fixture
def evaluate(monkeypatch, mesh):
    """The online evaluation of pixels: (what it yields, the images that the monitors got)."""

    def evaluate(source, test_source, **changes):
        shown = []
        monkeypatch.setattr(jepa_eval, "encode_fn", lambda *a: jepa_eval.pixels)
        monkeypatch.setattr(
            jepa_eval.monitors, "report", lambda tokens, grid: shown.append(tokens) or {"x": 0.0}
        )
        monkeypatch.setattr(jepa_eval.monitors, "rankme", lambda features: 1.0)
        state = type("State", (), {"extra": {"target": None}})
        monitor = jepa_eval.online_monitor(settings(**changes), mesh, source, test_source)
        return dict(monitor(state)), np.asarray(shown[0])

    return evaluate


# --- which images ---------------------------------------------------------------------------------


def test_a_part_of_a_set_that_is_sorted_by_class_has_all_classes(mesh):
    source = digits_by_class()
    part = jepa_eval.features(settings(), mesh, jepa_eval.pixels, source, 300)
    counts = np.bincount(part.labels["label"], minlength=10)
    assert len(part.last) == 300 and counts.min() > 10, counts
    smaller = jepa_eval.features(settings(), mesh, jepa_eval.pixels, source, 100)
    np.testing.assert_array_equal(smaller.last, part.last[:100])


def test_monitors_and_knn_see_all_classes(evaluate):
    source, test = digits_by_class(), digits_by_class("test")
    values, tokens = evaluate(source, test, **{"probe.knn_train": 700, "probe.knn_test": 200})
    assert 0.9 < values["knn_label"] < 1  # with the first rows it was 1: one class
    of_test = {CROP(test[i], None)["image"].tobytes(): test[i]["label"] for i in range(len(test))}
    images = np.round(tokens.reshape(-1, 32, 32, 3) * 255).astype(np.uint8)
    assert np.bincount([of_test[x.tobytes()] for x in images], minlength=10).min() > 5


def test_the_same_images_whatever_the_seed(mesh):
    parts = [
        jepa_eval.features(settings(**{"train.seed": s}), mesh, jepa_eval.pixels, digits_by_class(), 50)
        for s in (0, 1)
    ]  # fmt: skip
    np.testing.assert_array_equal(parts[0].last, parts[1].last)


def test_examples_of_a_metaopt_task_are_of_all_classes(monkeypatch):
    monkeypatch.setattr(metaopt_mlp, "open_source", lambda *a: digits_by_class())
    x, y = metaopt_mlp.read_images("any", "train", examples=200)
    assert len(x) == 200 and np.bincount(y, minlength=10).min() > 5


# --- labels ---------------------------------------------------------------------------------------


def test_images_without_a_label_neither_vote_nor_count(evaluate, mesh):
    def some(labels):
        return np.where(np.arange(len(labels)) % 3, labels, -1)

    all_images = {"probe.knn_train": None, "probe.knn_test": None}
    source, test = digits_by_class(some=some), digits_by_class("test", some=some)
    values, _ = evaluate(source, test, **all_images)
    kept = [
        array_source(**{k: v[s.arrays["some"] >= 0] for k, v in s.arrays.items()})
        for s in (source, test)
    ]
    alone, _ = evaluate(*kept, **all_images)
    assert values["knn_some"] == alone["knn_label"] != values["knn_label"]


def test_a_set_without_labels_has_no_probe_and_says_so_once(evaluate, mesh, caplog):
    none = {"none": lambda labels: np.full(len(labels), -1)}
    source, test = digits_by_class(**none), digits_by_class("test", **none)
    values, _ = evaluate(source, test)
    assert "knn_none" not in values and "knn_label" in values
    assert caplog.text.count("no probe of 'none': no training image has a label") == 1
    images = array_source(image=source.arrays["image"])
    values, _ = evaluate(images, images)
    assert not any(name.startswith("knn") for name in values) and "rankme" in values
    found = jepa_eval.linear_probes(settings(), mesh, jepa_eval.pixels, images, images)
    assert found == {} and "has no labels" in caplog.text


def test_numbers_of_images_are_no_labels(evaluate, caplog):
    numbers = {
        name: lambda labels: np.arange(len(labels))
        for name in ("id", "image_id", "index", "serial")
    }
    source, test = digits_by_class(**numbers), digits_by_class("test", **numbers)
    assert jepa_eval.label_names(source) == ("label", "serial")
    values, _ = evaluate(source, test, **{"probe.knn_train": None})
    assert {k for k in values if k.startswith("knn")} == {"knn_label"}
    assert "'serial': its values, to 1,437, number the images" in caplog.text


def test_a_single_class_has_no_probe_and_says_so_once(evaluate, mesh, caplog):
    same = {"same": np.zeros_like}
    source, test = digits_by_class(**same), digits_by_class("test", **same)
    source, test = (
        array_source(image=s.arrays["image"], same=s.arrays["same"]) for s in (source, test)
    )
    values, _ = evaluate(source, test)
    assert "knn_same" not in values and "rankme" in values
    assert caplog.text.count("no probe of 'same': all") == 1
    assert jepa_eval.linear_probes(settings(), mesh, jepa_eval.pixels, source, test) == {}


# --- what is refused ------------------------------------------------------------------------------


def save(path, i, cut=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])


@pytest.mark.parametrize("recipe", [in22k_vith14, in22k_vitg16])
@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test"), ("train",), ("",)])
def test_the_recipes_of_imagenet_22k_take_any_folder(recipe, splits, tmp_path):
    for split in splits:
        for i in range(60):
            save(tmp_path / split / f"n{i % 3}" / f"{i}.jpg", i)
    config = recipe.get_config("smoke")
    config.data.update(name=f"folder:{tmp_path}", test_split="validation")
    resolved, sets, _ = open_run(config.to_dict())
    assert len(sets.train) + len(sets.test) == 60 * len(splits) and sets.bank is sets.train
    share = 0.1 if len(splits) == 1 else None
    found = jepa_eval.linear_probes  # what a row will say
    assert found and jepa_eval._left_out(sets.bank, sets.test).get("held_out") == share
    assert resolved.data.test_split == "validation"


def test_a_probe_is_not_tested_on_what_it_learned_from(tmp_path):
    config = get_config("smoke")
    config.data.test_split = "train"
    with pytest.raises(ConfigError, match=r"test_split='train'.*probe.test_on_train=true"):
        open_run(config.to_dict())
    config.probe.test_on_train = True
    open_run(config.to_dict())
    config.probe.test_on_train = False
    config.data.probe_split = "test"  # the test images may be trained on, without labels
    sets = open_run(config.to_dict())[1]
    assert sets.train is not sets.bank and len(sets.bank) == 359


def test_too_few_images_are_refused_before_training(tmp_path):
    for i in range(12):
        save(tmp_path / "a" / f"{i}.png", i)
    config = get_config("smoke")
    config.data.name = f"folder:{tmp_path}"
    with pytest.raises(
        ConfigError, match=r"config.data.split='train' has 1\d images.*neighbors=20"
    ):
        open_run(config.to_dict())


@pytest.mark.parametrize("link", ["folder", "file"])
def test_links_to_the_training_images_are_no_test_set(tmp_path, link):
    for i in range(30):
        save(tmp_path / "train" / f"n{i % 2}" / f"{i}.png", i)
        save(tmp_path / "val" / "n1" / f"{i + 30}.png", i + 30)
    place, of = ("n0", "n0") if link == "folder" else ("n1/x.png", "n1/1.png")
    (tmp_path / "val" / place).symlink_to(tmp_path / "train" / of)
    config = get_config("smoke")
    config.data.update(name=f"folder:{tmp_path}", test_split="val")
    with pytest.raises(ConfigError, match=r"test_split='val' holds images .* or links to them"):
        open_run(config.to_dict())


def test_a_single_test_image_is_refused_with_a_remedy(tmp_path):
    for i in range(25):
        save(tmp_path / "train" / f"{i}.png", i)
    config = get_config("smoke")
    config.data.update(name=f"folder:{tmp_path}", held_out=1e-6)
    with pytest.raises(ConfigError, match=r"has 1 image.*raise config.data.held_out=1e-06"):
        open_run(config.to_dict())
    save(tmp_path / "test" / "1.png", 99)
    with pytest.raises(
        ConfigError, match=r"has 1 image.*add images.*another config.data.test_split"
    ):
        open_run(config.to_dict())


@pytest.mark.parametrize(
    "name, value",
    [
        ("crop_scale", (0.5, 2.0)),
        ("crop_scale", (0.9, 0.5)),
        ("crop_ratio", (0.0, 1.0)),
        ("eval_resize", 8),
    ],
)
def test_a_wrong_crop_names_its_setting(name, value):
    with pytest.raises(ConfigError, match=rf"^config\.data\.{name}={re.escape(str(value))}: give"):
        settings(**{f"data.{name}": value})


def test_features_that_do_not_fit_the_memory_are_refused_before_training(tmp_path, monkeypatch):
    config = get_config("smoke")
    config.probe.train_examples = config.probe.test_examples = None
    monkeypatch.setattr(jepa_data, "host_memory", lambda: 2**19)
    with pytest.raises(
        ConfigError, match=r"1,438 training and 359 test images.*train_examples to 596 or less"
    ):
        open_run(config.to_dict())
    config.probe.linear = False
    open_run(config.to_dict())


def test_the_features_of_a_released_recipe_are_known_in_advance():
    config = in22k_vith14.get_config("")
    resolved = resolve(config.to_dict(), 1_281_167)
    sets = jepa_data.Sets(None, range(1_281_167), range(50_000))
    assert jepa_data.feature_rows(resolved, sets) == ((1_281_167, 50_000), 4 * 5 * 1280)


# --- damaged files --------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """A folder without splits, 5 of its 80 images cut short; and one file that is none."""
    for i in range(80):
        save(tmp_path / "images" / f"{i % 2}" / f"{i}.jpg", i, cut=200 * (i < 5))
    (tmp_path / "images" / "0" / "notes.txt").write_text("")
    return tmp_path / "images"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_ends_a_run_in_one_line_or_is_counted(
    damaged, tmp_path, capsys, workers, caplog
):
    (damaged / "0" / "notes.txt").unlink()
    caplog.set_level(logging.INFO)
    flags = [
        "launch", "--config=experiments/jepa/configs/scenes.py:smoke", f"--workdir={tmp_path}/run",
        f"--config.data.name=folder:{damaged}", f"--config.data.workers={workers}", "--config.train.steps=9",
        "--config.train.batch=8", "--config.train.eval_every=9", "--config.probe.train_examples=None",
    ]  # fmt: skip
    assert launch_in_this_process(flags) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {damaged}/") and text.count("\n") == 1, text
    assert "--config.data.skip_bad=true" in text
    if workers:
        return
    assert launch_in_this_process([*flags, "--config.data.skip_bad=true"]) == 0
    row = (tmp_path / "run" / "result.json").read_text()
    assert '"skipped_images": 5.0' in row and '"held_out": 0.1' in row
    assert sum("skipped: " in r.getMessage() for r in caplog.records) == 5


def launch_in_this_process(argv):
    import sys

    from absl.testing import flagsaver

    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        patch.setattr(sys, "argv", argv)
        return launch.main(argv)


def test_skipped_images_are_counted(damaged, mesh, caplog):
    with pytest.warns(UserWarning, match="1 of 81 files"):
        source = open_source(f"folder:{damaged}", skip_bad=True)
    part = jepa_eval.features(settings(), mesh, jepa_eval.pixels, source)
    assert len(part.last) == 75 and len(part.labels["label"]) == 75
    assert jepa_eval._left_out(source, source) == {"skipped_images": 6.0}
