"""A row says what was run and on what, is never lost or torn, and tables follow from rows."""

import dataclasses
import fcntl
import json
import math
import re
import socket
import threading

import pytest

from common.results import (
    append_row,
    config_hash,
    make_row,
    markdown_table,
    read_rows,
)


def row(seed=0, **kwargs):
    defaults = dict(
        job="jepa.pretrain",
        config="experiments/jepa/configs/vits16.py",
        arg="smoke",
        overrides={"optim.lr": 1e-3},
        resolved={"optim": {"lr": 1e-3}, "seed": seed},
        metrics={"top1": 0.5},
        seeds=[seed],
        steps=10,
        wall_seconds=1.23456,
    )
    return make_row(**{**defaults, **kwargs})


def test_rows_come_back_equal(tmp_path):
    path = tmp_path / "results" / "jepa.jsonl"
    rows = [row(seed) for seed in range(3)]
    for r in rows:
        append_row(path, r)
    assert read_rows(path) == rows
    assert read_rows(tmp_path / "none.jsonl") == []


def test_non_finite_metrics_survive(tmp_path):
    append_row(tmp_path / "r.jsonl", row(metrics={"a": math.nan, "b": -math.inf}))
    (back,) = read_rows(tmp_path / "r.jsonl")
    assert math.isnan(back.metrics["a"]) and back.metrics["b"] == -math.inf


def test_a_row_says_what_was_run():
    r = row(seed=7)
    assert re.fullmatch(r"vits16-[0-9a-f]{8}", r.id)
    assert r.config == "vits16" and r.seeds == (7,) and r.wall_seconds == 1.235
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", r.date)
    assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?|v[\d.]+|unknown", r.commit)
    assert {"python", "jax", "flax", "optax"} <= r.versions.keys()
    assert re.search(r"\d+ cores", r.hardware)


def test_different_runs_have_different_ids():
    assert len({row(seed, metrics={"x": x}).id for seed in range(5) for x in (1.0, 2.0)}) == 10


def test_rows_hold_no_host_name_and_no_path(tmp_path):
    r = row(
        config=str(tmp_path / "mine.py"),
        arg=f"smoke,model={tmp_path}/model",
        changes=[{"step": 3, "config.data.name": [f"folder:{tmp_path}", "scenes"]}],
        overrides={"data.dir": str(tmp_path), "init": f"from={tmp_path}/step_3", "variant": "S/16"},
    )
    text = json.dumps(dataclasses.asdict(r))
    assert str(tmp_path) not in text and socket.gethostname() not in text
    assert r.overrides == {"data.dir": tmp_path.name, "init": "from=step_3", "variant": "S/16"}


@pytest.mark.parametrize(
    "value, kept",
    [
        ("/home/me/data", "data"),
        ("~/data/x.bin", "x.bin"),
        ("gs://bucket/run", "gs://bucket/run"),
        ("folder:/home/me/images", "folder:images"),
        ("/home/me/images/", "images/"),
        ("configs/jepa/a.py", "configs/jepa/a.py"),
        ("['/a/b', '/c/d']", "['b', 'd']"),
        (3, 3),
    ],
)
def test_only_absolute_paths_are_cut(value, kept):
    assert row(overrides={"x": value}).overrides == {"x": kept}


def test_the_config_hash_depends_on_values_only():
    a = config_hash({"x": 1, "y": {"z": (1, 2)}})
    assert a == config_hash({"y": {"z": [1, 2]}, "x": 1})
    assert a != config_hash({"x": 1, "y": {"z": [1, 3]}})
    assert len(a) == 12


def test_rows_from_before_a_field_was_recorded_are_read(tmp_path):
    old = dataclasses.asdict(row())
    for name in ("changes", "processes", "devices", "mesh", "dtype", "seconds"):
        del old[name]
    (tmp_path / "r.jsonl").write_text(json.dumps(old) + "\n")
    (back,) = read_rows(tmp_path / "r.jsonl")
    assert back.metrics == old["metrics"] and (back.changes, back.devices) == ((), 0)


def test_a_torn_line_is_cut_before_the_next_row(tmp_path):
    path = tmp_path / "r.jsonl"
    append_row(path, row(0))
    with open(path, "a") as file:
        file.write('{"id": "to')
    assert [r.seeds for r in read_rows(path)] == [(0,)]
    append_row(path, row(1))
    assert [r.seeds for r in read_rows(path)] == [(0,), (1,)]


def test_the_same_row_cannot_be_added_twice(tmp_path):
    r = row()
    append_row(tmp_path / "r.jsonl", r)
    with pytest.raises(ValueError, match=r.id):
        append_row(tmp_path / "r.jsonl", r)


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    append_row(path, row())
    path.write_text(path.read_text() + '{"id": "x", "speed": 1}\n')
    with pytest.raises(ValueError, match=r"r.jsonl:2 .*speed"):
        read_rows(path)


def test_an_append_waits_for_another_job_that_holds_the_file(tmp_path):
    path = tmp_path / "r.jsonl"
    append_row(path, row(0))
    job = threading.Thread(target=append_row, args=(path, row(1)))
    with open(path, "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        job.start()
        job.join(timeout=0.5)
        assert job.is_alive() and len(read_rows(path)) == 1
    job.join(timeout=30)
    assert [r.seeds for r in read_rows(path)] == [(0,), (1,)]


def test_tables_align_numbers_and_escape_bars():
    table = markdown_table(
        ["model", "top-1", "ours"],
        [["a|b", 0.123456, "0.5 ± 0.01"], ["c", None, "0.25"]],
    )
    assert table == (
        "| model | top-1 | ours |\n"
        "| --- | ---: | --- |\n"
        "| a\\|b | 0.1235 | 0.5 ± 0.01 |\n"
        "| c |  | 0.25 |\n"
    )
    assert markdown_table(["a", "b"], []) == "| a | b |\n| --- | --- |\n"
    with pytest.raises(ValueError, match="2 cells"):
        markdown_table(["a", "b"], [[1]])
