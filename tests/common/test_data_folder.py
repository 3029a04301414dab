"""What a folder of images is: its splits, held-out share, classes, names and links."""

import logging
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from common.data import LoaderSpec, check_fingerprint, fingerprint, open_source, overlapping
from common.data.__main__ import main


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (2, 2), value).save(path)


def names(source):
    return {os.path.join(source.root, path) for path in source.paths}


@pytest.fixture
def flat(tmp_path):
    for i in range(200):
        save(tmp_path / f"{i % 2}" / f"{i}.png")
    return tmp_path


def test_a_share_is_held_out_where_there_is_nothing_to_test_on(flat, caplog):
    caplog.set_level(logging.INFO)
    train, test = (open_source(f"folder:{flat}", s, held_out=0.2) for s in ("train", "test"))
    assert len(train) + len(test) == 200 and 20 < len(test) < 60
    assert not names(train) & names(test)
    assert set(test.labels) == set(train.labels) == {0, 1}
    assert f"{len(test)} images are held out (held_out=0.2)" in caplog.text
    assert fingerprint(train, LoaderSpec(1, 0))["held_out"] == 0.2
    whole = open_source(f"folder:{flat}")
    assert names(whole) == names(train) | names(test)
    assert not overlapping(train, test) and overlapping(whole, test) and overlapping(test, test)


def test_what_is_held_out_stays_so_when_files_are_added(flat):
    before = names(open_source(f"folder:{flat}", "test", held_out=0.1))
    for i in range(200, 230):
        save(flat / "1" / f"{i}.png")
    assert before <= names(open_source(f"folder:{flat}", "test", held_out=0.1))


def test_a_few_files_hold_out_one(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png")
    assert len(open_source(f"folder:{tmp_path}", "test", held_out=0.001)) == 1
    assert len(open_source(f"folder:{tmp_path}", "train", held_out=0.001)) == 2


def test_train_alone_is_held_out_of_too(tmp_path):
    for i in range(50):
        save(tmp_path / "train" / "a" / f"{i}.png")
    train, test = (
        open_source(f"folder:{tmp_path}", s, held_out=0.2) for s in ("train", "validation")
    )
    assert len(train) + len(test) == 50 and len(test) > 1


@pytest.mark.parametrize("there", ["test", "val", "validation"])
@pytest.mark.parametrize("asked", ["test", "val", "validation"])
def test_any_split_to_test_on_serves(tmp_path, there, asked):
    save(tmp_path / "train" / "a" / "1.png")
    save(tmp_path / there / "a" / "2.png", 9)
    source = open_source(f"folder:{tmp_path}", asked, held_out=0.5)
    assert source[0]["image"].max() == 9 and len(source) == 1
    assert len(open_source(f"folder:{tmp_path}", held_out=0.5)) == 1  # nothing is set aside


def test_the_split_of_that_name_comes_first(tmp_path):
    for value, split in enumerate(("train", "test", "val")):
        save(tmp_path / split / "a.png", value)
    for value, split in enumerate(("train", "test", "val")):
        assert open_source(f"folder:{tmp_path}", split)[0]["image"].max() == value


def test_without_a_share_there_is_no_test_and_the_remedy_is_named(flat):
    with pytest.raises(ValueError, match=r"only the split train; got split 'test'.*held_out=0\.1"):
        open_source(f"folder:{flat}", "test")
    with pytest.raises(ValueError, match="held_out=1"):
        open_source(f"folder:{flat}", "test", held_out=1.0)


def test_empty_folders_are_no_classes(tmp_path, caplog):
    for split in ("train", "test"):
        save(tmp_path / split / "b" / "1.png")
        (tmp_path / split / "a" / "deep").mkdir(parents=True)
        (tmp_path / split / "a" / ".DS_Store").write_text("")
    for split in ("train", "test"):
        source = open_source(f"folder:{tmp_path}", split)
        assert source.classes == ("b",) and source[0]["label"] == 0
    assert "empty folders are no classes: a" in caplog.text


def test_names_that_are_not_utf8_are_read_and_shown(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    save(tmp_path / name, 7)
    source = open_source(f"folder:{tmp_path}")
    assert source[0]["image"].max() == 7 and fingerprint(source, LoaderSpec(1, 0))
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError) as error:
        open_source(f"folder:{tmp_path}")
    assert r"caf\xe9.png: not an image" in str(error.value)
    str(error.value).encode()


def test_linked_folders_are_listed_once(tmp_path):
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for i in range(3):
        save(images / "b" / f"{i}.png")
        save(elsewhere / f"{i}.png")
    (images / "b" / "again").symlink_to(images)  # a cycle
    (images / "b" / "above").symlink_to(tmp_path)
    (images / "a").symlink_to(elsewhere)
    (images / "b" / "also").symlink_to(elsewhere)
    source = open_source(f"folder:{images}")
    assert source.paths == tuple(f"{c}/{i}.png" for c in "ab" for i in range(3))


def test_info_has_a_flag_to_skip_bad_files(tmp_path, capsys):
    save(tmp_path / "1.png")
    (tmp_path / "notes.txt").write_text("")
    assert main(["info", f"folder:{tmp_path}"]) == 1
    assert "--skip_bad" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="1 of 2 files"):
        assert main(["info", f"folder:{tmp_path}", "--skip_bad"]) == 0
    assert "train 1" in capsys.readouterr().out


def test_a_link_to_another_class_does_not_take_its_images(tmp_path):
    save(tmp_path / "b" / "1.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b")
    save(tmp_path / "a" / "2.png")
    source = open_source(f"folder:{tmp_path}")
    assert source.paths == (os.path.join("a", "2.png"), os.path.join("b", "1.png"))
    assert np.array_equal(source.labels, [0, 1])


def test_folders_beside_the_splits_are_named(tmp_path, caplog):
    """An unsplit folder may have a class of that name: then its other classes would be missing unsaid."""
    for name in ("train", "car", "ship"):
        save(tmp_path / name / "1.png")
    assert len(open_source(f"folder:{tmp_path}")) == 1
    assert "only the split folders are read, not car, ship" in caplog.text


def test_a_file_that_is_left_out_is_counted_in_one_part(flat):
    (flat / "0" / "notes.txt").write_text("")
    with pytest.warns(UserWarning, match="1 of 201 files"):
        parts = [
            open_source(f"folder:{flat}", s, held_out=0.2, skip_bad=True) for s in ("train", "test")
        ]
    assert sum(part.left_out for part in parts) == 1


# --- what a folder's identity and overlap see ------------------------------------------------------


def test_an_image_replaced_by_one_of_another_size_is_another_data_set(flat):
    before = [open_source(f"folder:{flat}", s, held_out=0.2).identity for s in ("train", "test")]
    kept = open_source(f"folder:{flat}", held_out=0.2).paths[0]
    os.utime(flat / kept, (1, 1))
    again = [open_source(f"folder:{flat}", s, held_out=0.2).identity for s in ("train", "test")]
    assert again == before
    Image.effect_noise((9, 9), 50).save(flat / kept)
    train, test = (open_source(f"folder:{flat}", s, held_out=0.2) for s in ("train", "test"))
    assert train.identity != before[0] and test.identity == before[1]
    spec = LoaderSpec(1, 0)
    with pytest.raises(ValueError, match="trained on other data"):
        check_fingerprint({**fingerprint(train, spec), **before[0]}, fingerprint(train, spec))


@pytest.mark.parametrize("how", ["folder", "link", "hard link", "copy"])
def test_a_test_set_of_the_training_files_overlaps(tmp_path, how):
    for i in range(3):
        save(tmp_path / "train" / "a" / f"{i}.png", i)
    val = tmp_path / "val" / "a"
    if how == "folder":
        val.parent.mkdir()
        val.symlink_to("../train/a")
    else:
        save(val / "own.png")
        one = tmp_path / "train" / "a" / "1.png"
        make = {
            "link": val.joinpath("x.png").symlink_to,
            "hard link": val.joinpath("x.png").hardlink_to,
        }
        make.get(how, lambda path: shutil.copy(path, val / "x.png"))(one)
    train, test = (open_source(f"folder:{tmp_path}", s) for s in ("train", "val"))
    assert overlapping(train, test) == (how != "copy"), "copies are told by no name and no file"


def test_a_link_within_a_folder_may_not_lead_from_the_test_to_the_training_images(flat):
    train, test = (open_source(f"folder:{flat}", s, held_out=0.2) for s in ("train", "test"))
    assert not overlapping(train, test)
    (flat / test.paths[0]).unlink()
    (flat / test.paths[0]).symlink_to(flat / train.paths[0])
    train, test = (open_source(f"folder:{flat}", s, held_out=0.2) for s in ("train", "test"))
    assert overlapping(train, test)


def test_what_has_no_images_is_said_plainly(tmp_path):
    with pytest.raises(ValueError, match=r"has no images$"):
        open_source(f"folder:{tmp_path}", held_out=0.1)
    save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"no image left to train on: held_out=0\.1 .*of 1 in all"):
        open_source(f"folder:{tmp_path}", held_out=0.1)


def test_no_bar_leaves_a_line_where_there_is_no_terminal(flat, capsys):
    open_source(f"folder:{flat}")
    assert capsys.readouterr().out == ""
