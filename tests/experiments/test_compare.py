"""Runs beside each other: what is drawn, what is said of a wrong folder or series."""

import json
import math

import pytest

from experiments.compare import choose, main, names_of, read, table


def workdir(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path):
    steps = range(1, 6)
    hand = workdir(tmp_path / "hand", [{"step": s, "wall": 0, "loss": 5 / s} for s in steps])
    auto = [{"step": s, "loss": 4 / s, "lr": 0.1 * s} for s in steps]
    return [hand, workdir(tmp_path / "auto", [*auto, {"step": 6, "lr": 0.7}])]


def test_draws_and_tabulates(runs, tmp_path, capsys):
    picture = tmp_path / "out.png"
    assert main([*map(str, runs), "--series=loss,lr", f"--out={picture}"]) == 0
    assert picture.stat().st_size > 5000
    said = capsys.readouterr().out
    for word in ("hand", "auto", "0.8", "0.7", "nan", str(picture)):
        assert word in said


def test_shows_by_default_what_two_runs_share(runs):
    rows = {name: read(path) for name, path in zip(names_of(runs), runs)}
    assert choose(rows, []) == ["loss"]
    shown = table(rows, ["loss", "lr"])
    assert [list(column.cells) for column in shown.columns] == [
        ["hand", "auto"], ["5", "6"], ["1", "0.8"], [f"{math.nan}", "0.7"],
    ]  # fmt: skip


def test_runs_are_named_from_where_they_differ(tmp_path):
    assert names_of([tmp_path / "a" / "zero", tmp_path / "b" / "zero"]) == ["a/zero", "b/zero"]
    assert names_of([tmp_path / "a" / "zero"]) == ["zero"]


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--series=loss,rate"], "--series=rate: no run has it; they have loss, lr"),
        (["nowhere"], "nowhere holds no metrics.jsonl"),
        (["PARENT"], "did you mean"),
        (["EMPTY"], "has no rows yet"),
    ],
)
def test_wrong_input_is_one_line(runs, tmp_path, capsys, extra, message):
    workdir(tmp_path / "empty", [])
    extra = [{"PARENT": str(tmp_path), "EMPTY": str(tmp_path / "empty")}.get(e, e) for e in extra]
    assert main([*map(str, runs), *extra, f"--out={tmp_path / 'out.png'}"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_names_must_be_as_many_as_the_runs(runs, capsys):
    with pytest.raises(SystemExit):
        main([*map(str, runs), "--names=one"])
    assert "needs 2 different names" in capsys.readouterr().err
