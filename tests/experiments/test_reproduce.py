"""`make reproduce` goes through its parts whatever one of them does, and says which failed."""

import warnings

import pytest

from common.config import ConfigError
from common.distributed import EXIT_PREEMPTED
from common.results import append_row, make_row
from experiments import reproduce
from experiments.jepa import baselines as jepa_baselines
from experiments.jepa import pretrain as jepa_pretrain
from experiments.jepa import reproduce as jepa_scenes
from experiments.metaopt import reproduce as metaopt_digits
from experiments.shared.run import Run
from experiments.sinks import reproduce as sinks_quick

MODULES = {"metaopt": metaopt_digits, "sinks": sinks_quick, "jepa": jepa_scenes}


@pytest.fixture
def parts(monkeypatch):
    """(names of the parts that ran, a function that sets what a part does)."""
    ran = []

    def behave(name, outcome):
        def run(workdir, **_):
            assert workdir.name == name
            ran.append(name)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(MODULES[name], "run", run)

    for name in MODULES:
        behave(name, 0)
    return ran, behave


def test_quickest_first(parts, tmp_path):
    ran, _ = parts
    assert reproduce.main([f"--workdir={tmp_path}"]) == 0
    assert ran == ["metaopt", "sinks", "jepa"]


def test_only_some(parts, tmp_path):
    ran, _ = parts
    assert reproduce.main([f"--workdir={tmp_path}", "--only=jepa, metaopt"]) == 0
    assert ran == ["metaopt", "jepa"]


@pytest.mark.parametrize("outcome", [ConfigError("no network"), 1])
def test_a_failing_part_is_named_and_the_others_run(parts, tmp_path, caplog, outcome):
    ran, behave = parts
    behave("sinks", outcome)
    with caplog.at_level("INFO", logger="triptych"):
        assert reproduce.main([f"--workdir={tmp_path}"]) == 1
    assert ran == ["metaopt", "sinks", "jepa"]
    assert "failed: sinks" in caplog.text


def test_a_warning_is_one_line_without_a_place_in_the_code(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert reproduce.main([f"--workdir={tmp_path}"]) == 0
    assert warnings.formatwarning("no bos", UserWarning, "job.py", 14, "x()") == "warning: no bos\n"


def test_preempted_stops_at_once(parts, tmp_path):
    ran, behave = parts
    behave("sinks", EXIT_PREEMPTED)
    assert reproduce.main([f"--workdir={tmp_path}"]) == EXIT_PREEMPTED
    assert ran == ["metaopt", "sinks"]


def test_a_seed_of_the_scenes_is_a_run_and_its_baselines_in_one_workdir(tmp_path, monkeypatch):
    runs = []
    for module in (jepa_pretrain, jepa_baselines):
        monkeypatch.setattr(module, "run", lambda run: runs.append(run) or run.begin(0) or 0)
    assert jepa_scenes.run_seed(2, 0.5, tmp_path, "data") == 0
    assert [run.job for run in runs] == ["jepa_pretrain", "jepa_baselines"]
    assert {(run.config, run.arg) for run in runs} == {("scenes", "seed=2,epochs=0.5")}
    values = runs[0].values
    assert values["train"]["seed"] == 2 and values["data"]["data_dir"] == "data"
    with pytest.raises(
        ConfigError, match=r"config\.train\.epochs: saved 0\.5, now 3\.0"
    ) as refusal:
        Run(
            values | {"train": values["train"] | {"epochs": 3.0}}, runs[0].workdir, has_flag=False
        ).check()
    assert "--resume" not in str(refusal.value), "make reproduce has no such flag"


def test_a_seed_counts_once_and_no_other_seeds_are_shown(tmp_path):
    for seed, value in ((0, 0.1), (0, 0.2), (1, 0.3), (2, 0.9)):
        row = make_row(
            job="jepa_pretrain", config="scenes", metrics={"x": value}, seeds=[seed], steps=1, wall_seconds=1.0
        )  # fmt: skip
        append_row(tmp_path / f"seed{seed}" / "results.jsonl", row)
    found = jepa_scenes.latest_rows(tmp_path, 2)
    assert [row.metrics["x"] for row in found] == [0.2, 0.3]


@pytest.mark.parametrize(
    "flag",
    ["--only=dinosaur", "--seeds=0", *(f"--epochs={n}" for n in ("0", "-1", "nan", "inf", "few"))],
)
def test_wrong_flags_are_named(parts, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        reproduce.main([flag])
    assert stop.value.code == 2
    assert flag.partition("=")[2] in capsys.readouterr().err
