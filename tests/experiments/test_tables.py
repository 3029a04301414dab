"""The reproduction tables say what the committed rows say."""

import json
import shutil

import pytest

from common.results import make_row, to_json
from experiments.tables import HERE, main, render


def test_the_committed_tables_are_those_of_the_committed_rows():
    assert main(["--check"]) == 0


@pytest.mark.slow
def test_a_new_row_puts_the_tables_out_of_date(tmp_path, capsys):
    results, out = tmp_path / "results", tmp_path / "tables.md"
    shutil.copytree(HERE / "results", results)
    flags = [f"--results={results}", f"--out={out}"]
    assert main([*flags, "--check"]) == 1  # there is none
    assert main(flags) == 0 and main([*flags, "--check"]) == 0
    bench = results / "jepa" / "bench_step.jsonl"
    row = json.loads(bench.read_text().splitlines()[-1])
    row["metrics"]["images_per_second_ours"] = 123.4
    bench.write_text(json.dumps(row) + "\n")
    assert main([*flags, "--check"]) == 1
    assert "out of date: run python -m experiments.tables" in capsys.readouterr().err
    assert main(flags) == 0 and "| ours | 123.4 |" in out.read_text()


def test_a_method_is_judged_by_its_worst_run_and_divergence_is_starred(tmp_path):
    runs = {"good": [(0.02, 0.0), (0.03, 0.0)], "bad": [(0.01, 0.0), (0.9, 1.0)]}
    lines = []
    for method, cells in runs.items():
        for rate, (error, diverged) in zip((1e-3, 1.0), cells):
            row = make_row(
                job="metaopt_grid", config="r", metrics={"error": error, "diverged": diverged},
                seeds=[0], steps=7, wall_seconds=1.0,
                overrides={"method": method, "initial_rate": rate},
            )  # fmt: skip
            lines.append(to_json(vars(row)) + "\n")
    folder = tmp_path / "metaopt"
    folder.mkdir()
    (folder / "robustness_toy.jsonl").write_text("".join(lines))
    text = render(tmp_path)
    assert "after 7 steps" in text and "### Table 1" not in text  # tables without rows are left out
    good, bad = (
        text.index("| good | 2.00 | 3.00 | 3 | 2.45 | 0 |"),
        text.index("| bad | 1.00 | 90.00* |"),
    )
    assert good < bad


def test_a_wrong_folder_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--results=nowhere"])
    assert "--results=nowhere is no folder" in capsys.readouterr().err
