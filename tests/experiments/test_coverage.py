"""Every number of the papers has a status, a result that rows bear out, or a command that the launcher takes."""

import csv
import json
import math
import re
import shlex
import shutil
import sys
from fnmatch import fnmatchcase

import pytest
from absl.testing import flagsaver

from common.config import build
from experiments import coverage, jobs, launch
from experiments.jepa.settings import resolve as resolve_jepa
from experiments.metaopt import grid_job, table1
from experiments.shared.published import published
from experiments.shared.tables import HERE
from experiments.sinks import perplexity, speed, tasks
from experiments.tables import main

RESULTS = HERE / "results"
FOUND = {paper: coverage.entries(paper) for paper in coverage.PAPERS}
COMMANDS = sorted({entry.command for found in FOUND.values() for entry in found} - {""})
CHECKS = {  # by job: what reads its settings
    "jepa_pretrain": resolve_jepa,
    "metaopt_grid": lambda values: build(grid_job.Settings, values),
    "sinks_perplexity": lambda values: build(perplexity.Settings, values),
    "sinks_speed": lambda values: build(speed.Settings, values),
    "sinks_streameval": lambda values: build(tasks.StreamEvalSettings, values),
    "sinks_qa_stream": lambda values: build(tasks.QASettings, values),
}


@pytest.mark.parametrize("paper", FOUND)
def test_no_number_and_no_status_is_blank(paper):
    numbers = published(paper)
    assert [entry.number for entry in FOUND[paper]] == numbers
    assert len({number.id for number in numbers}) == len(numbers) > 100
    for number in numbers:
        needed = (number.id, number.table, number.what, number.setting, number.metric)
        assert all(needed) and number.value and number.source.startswith("arXiv:"), number
    for entry in FOUND[paper]:
        assert all(getattr(entry, name) for name in coverage.NEEDS[entry.status]), entry


@pytest.mark.parametrize("paper", FOUND)
def test_no_line_of_the_mapping_is_dead(paper):
    ids = [number.id for number in published(paper)]
    with open(HERE / paper / "coverage.csv") as file:
        dead = [x for x in csv.DictReader(file) if not any(fnmatchcase(i, x["rows"]) for i in ids)]
    assert not dead


@pytest.mark.parametrize("paper", FOUND)
def test_the_page_counts_every_number(paper):
    page = coverage.render(RESULTS)
    section = page.partition(f"\n## {paper}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if re.match(r"\| (`|\d+ numbers)", line)]
    assert not any("|  |" in line for line in lines)  # nothing blank
    counted = [int(m[1]) if (m := re.match(r"\| (\d+) numbers", line)) else 1 for line in lines]
    assert sum(counted) == len(FOUND[paper])


@pytest.mark.parametrize("paper", FOUND)
def test_results_are_those_of_rows(paper):
    for entry in FOUND[paper]:
        if "result" in coverage.NEEDS[entry.status]:
            value, _, _, ids = coverage.ours(entry, RESULTS / paper)
            assert ids, entry
            assert entry.status != "reproduced" or math.isfinite(value - float(entry.number.value))


def test_a_result_has_the_papers_unit_the_spread_over_seeds_and_the_rows_id():
    by_id = {entry.number.id: entry for entry in FOUND["metaopt"]}
    rows = (RESULTS / "metaopt" / "mnist_table1.jsonl").read_text().splitlines()
    row = next(r for r in map(json.loads, rows) if r["overrides"]["row"] == "SGD/RMSProp(0.1)")
    error, sd = row["metrics"]["error"], row["metrics"]["error_sd"]
    got = coverage.ours(by_id["table1a/SGD/RMSProp(0.1)"], RESULTS / "metaopt")
    assert got == (100 * error, 100 * sd, 3, [row["id"]])
    # A rate is a bare number, and an overhead is what a ratio has above 1.
    rate = coverage.ours(by_id["table1a/SGD/RMSProp(0.1)/alpha"], RESULTS / "metaopt")
    assert rate[0] == row["metrics"]["learned/learning_rate"]
    assert 0 < coverage.ours(by_id["figure4f/mlp/height1"], RESULTS / "metaopt")[0] < 20
    line = "| `table1a/SGD/RMSProp(0.1)` | 4.52 ± 0.02 % | reproduced | 4.49 ± 0.19 (3 seeds) | -0.03 |"
    assert line in coverage.render(RESULTS)


def test_rows_that_differ_in_seed_are_averaged_and_a_seed_that_comes_twice_is_refused(tmp_path):
    (entry,) = (e for e in FOUND["jepa"] if e.number.id == "table4/i-jepa_vit-h14/clevrcount")
    rows = [
        {"id": str(seed), "job": "jepa_pretrain", "seeds": [seed], "metrics": {"linear_count": x}}
        for seed, x in ((0, 0.3), (1, 0.4))
    ]
    file = tmp_path / "scenes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    value, spread, seeds, ids = coverage.ours(entry, tmp_path)
    assert (value, spread, seeds, ids) == (pytest.approx(35), pytest.approx(50**0.5), 2, ["0", "1"])
    file.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0] | {"id": "2"}) + "\n")
    with pytest.raises(ValueError, match="several rows have the same seed: 0, 2"):
        coverage.ours(entry, tmp_path)
    file.write_text(json.dumps(rows[0] | {"job": "baseline_pixels"}) + "\n")
    with pytest.raises(ValueError, match="has no row with job=jepa_pretrain"):
        coverage.ours(entry, tmp_path)


def test_a_number_without_a_status_or_what_it_needs_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "jepa"
    folder.mkdir()
    shutil.copy(HERE / "jepa" / "published.csv", folder)
    monkeypatch.setattr(coverage, "HERE", tmp_path)
    head = "rows,status,result,metric,command,cost,note\n"
    for lines, wrong in (
        ("table*,not feasible,,,,,why\n", "text/pretraining_on_a100 has status ''"),
        ("*,done,,,,,why\n", "has status 'done'"),
        ("*,reproduced,f.jsonl,,,,\n", "has no metric"),
        ("*,command only,,,c.py,,\n", "has no cost"),
    ):
        (folder / "coverage.csv").write_text(head + lines)
        with pytest.raises(ValueError, match=wrong):
            coverage.entries("jepa")


def test_no_two_commands_share_a_workdir():
    workdirs = [command.rpartition(" --workdir=")[2] for command in COMMANDS]
    assert len(set(workdirs)) == len(COMMANDS) > 20
    assert all(re.fullmatch(r"runs/[\w.-]+", workdir) for workdir in workdirs)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_accepted(command, monkeypatch, tmp_path):
    began = []
    real = jobs.find

    def find(name):
        assert real(name)
        return lambda run: began.append(run.values) or 0

    monkeypatch.setattr(jobs, "find", find)
    argv = ["launch", *shlex.split(f"--config={command}")]
    argv[-1] = argv[-1].replace("--workdir=", f"--workdir={tmp_path}/")
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
    with flagsaver.flagsaver():
        assert launch.main(argv) == 0
    (values,) = began
    CHECKS[values["job"]](values)


def test_hours_follow_from_their_basis():
    h100 = 989e12 * 0.4 * 3600
    assert coverage.hours(f"2 x {h100:.0f} parameters", RESULTS) == (
        f"2 H100-hours = 2 x {h100:.0f} parameters"
    )
    recipe = json.loads((RESULTS / "jepa" / "preflight.json").read_text())[0]
    text = coverage.hours(f"preflight {recipe['config']} x 1000000 images", RESULTS / "jepa")
    assert text.startswith(f"{1e6 * recipe['flops'] / recipe['batch'] / h100:.2g} H100-hours = ")
    text = coverage.hours("row quick.jsonl x 60 times", RESULTS / "sinks")
    row = json.loads((RESULTS / "sinks" / "quick.jsonl").read_text())
    assert text.startswith(f"{row['wall_seconds'] / 60:.2g} hours of {row['hardware']} = ")


def test_the_check_covers_the_page(tmp_path, capsys):
    out = tmp_path / "tables.md"
    assert main([f"--out={out}"]) == 0 and main([f"--out={out}", "--check"]) == 0
    (tmp_path / "coverage.md").write_text("# Coverage\n")
    assert main([f"--out={out}", "--check"]) == 1
    assert "coverage.md is out of date" in capsys.readouterr().err


def test_table_1_has_the_papers_number_for_each_row():
    again = {row.name for row in table1.ROWS if row.rerun}
    assert table1.printed(False).keys() == {row.name for row in table1.ROWS}
    assert table1.printed(True).keys() == again and len(again) == 14
    assert table1.printed(True)["SGD/RMSProp(0.1)"] == "2.52"
