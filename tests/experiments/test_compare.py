"""Runs beside each other: what is drawn, what is said of a wrong folder or series."""

import json
import math

import pytest

from experiments import compare
from experiments.compare import choose, last_values, main, names_of, read


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
    shown = last_values(rows, ["loss", "lr"])
    assert [list(column.cells) for column in shown.columns] == [
        ["step", "", "loss", "", "lr", ""], ["hand", "auto"] * 3,
        ["5", "6", "1", "0.8", f"{math.nan}", "0.7"],
    ]  # fmt: skip


@pytest.mark.parametrize("count", [2, 12])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_narrow_terminal_cuts_no_number(tmp_path, monkeypatch, capsys, width, count):
    series = ["loss", "images_per_second", "eval/token_position_r2", *(f"s{i}" for i in range(17))]
    values, paths = {}, []
    for r in range(count):
        row = {key: -(1 + r + 0.001 * i) * 1e-7 for i, key in enumerate(series)}
        values[f"seed{r}/[a]_long_name_of_a_run"] = row
        paths.append(
            workdir(tmp_path / f"seed{r}" / "[a]_long_name_of_a_run", [{"step": 100000, **row}])
        )
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(compare, "draw_comparison", lambda *args: None)
    assert main([*map(str, paths), f"--out={tmp_path / 'out.png'}"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()[:-1]
    assert max(map(len, lines)) <= width and "…" not in said
    cells = [cell.strip() for line in lines for cell in line.split("│")]
    numbers = [f"{value:.5g}" for row in values.values() for value in row.values()]
    assert [number for number in numbers if number not in cells] == []
    assert cells.count("100000") == count, "every run is there, once"


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


def test_the_picture_lies_where_it_is_said(runs, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for out, file in {
        "folder": "folder/compare.png", "new/": "new/compare.png", "plain": "plain.png", "a.svg": "a.svg",
    }.items():  # fmt: skip
        assert main([*map(str, runs), f"--out={tmp_path}/{out}"]) == 0
        assert (tmp_path / file).stat().st_size > 5000
        assert f"drew {tmp_path / file}\n" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out, why in {"x.foo": "one of png, pdf, svg", "file/x.png": f"{tmp_path}/file"}.items():
        assert main([*map(str, runs), f"--out={tmp_path}/{out}"]) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1


@pytest.mark.parametrize("as_file", [False, True])
def test_a_run_given_twice_is_said(runs, capsys, as_file):
    again = runs[0] / "metrics.jsonl" if as_file else runs[0]
    assert main([*map(str, runs), str(again)]) == 2
    said = capsys.readouterr().err
    assert f"{again} is given twice" in said and said.count("\n") == 1


def test_names_must_be_as_many_as_the_runs(runs, capsys):
    with pytest.raises(SystemExit):
        main([*map(str, runs), "--names=one"])
    assert "needs 2 different names" in capsys.readouterr().err
