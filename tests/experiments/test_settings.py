"""A setting is written once: in a dataclass, of which configs and `--help` are made. None says "not set"."""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from absl.testing import flagsaver

from common.optim import OptimSpec
from common.results import config_hash
from experiments import launch
from experiments.jepa.settings import resolve
from experiments.jobs import JOBS, about, find
from experiments.shared import old_settings, run
from experiments.shared.settings import describe, to_config, without

# What `smoke` of each config was in version 0.1, as its config.json had it.
OLD = json.loads((Path(__file__).parents[1] / "golden" / "configs_0.1.json").read_text())
SCENES = "--config=experiments/jepa/configs/scenes.py:smoke"


def config(name, arg="smoke"):
    paper, name = name.split(".")
    module = importlib.import_module(f"experiments.{paper}.configs.{name}")
    return module.get_config(arg).to_dict()


def kept(values):
    """What of a config's settings is not free to change."""
    return {k: v for k, v in run.settings_of(values).items() if not run.within(k, run.FREE)}


@pytest.fixture
def launched(monkeypatch, tmp_path, capsys):
    """(exit code, the settings that the job got or None, errors) of a command."""

    def launched(*arguments):
        argv, got = ["launch", *arguments, f"--workdir={tmp_path}/run"], []
        with monkeypatch.context() as patch, flagsaver.flagsaver():
            patch.setattr(sys, "argv", argv)
            patch.setattr("experiments.jobs.find", lambda name: lambda run: got.append(run) or 0)
            code = launch.main(argv)
        return code, got[0] if got else None, capsys.readouterr().err

    return launched


@pytest.mark.parametrize("name", OLD)
def test_every_setting_of_every_config_has_a_type_and_a_line(name):
    values = config(name)
    told = about(values)
    assert {f"config.{k}" for k in told} == set(run.settings_of(values))
    assert [k for k, (kind, line) in told.items() if not kind or len(line) < 10] == []


@pytest.mark.parametrize("name", OLD)
def test_a_run_of_version_0_1_goes_on_in_its_workdir(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD[name]))
    values = config(name)
    now = run.Run(values, tmp_path)
    assert now.changed == {}
    # Rows carry the hash of the settings as they were written then.
    row = now.row({"x": 1.0}, seeds=[0], steps=1)
    assert row.config_hash == config_hash(kept(OLD[name])) and now.owns(row)


def test_another_value_than_that_of_version_0_1_is_a_difference(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD["jepa.scenes"]))
    values = config("jepa.scenes")
    values["masks"]["context_tokens"] = 7
    values["optim"] |= {"clip": 1.0, "warmup": 2}
    assert run.Run(values, tmp_path).changed == {
        "config.masks.context_tokens": (None, 7),
        "config.optim.clip": (None, 1.0),
        "config.optim.warmup": (0, 2),
    }


def test_zero_is_zero(launched):
    code, started, errors = launched(SCENES, "--config.model.position_scale=0")
    assert (code, "warning" in errors) == (0, False)
    assert resolve(started.values).recipe.model.position_scale == 0.0


def test_a_setting_without_a_value_takes_one_of_its_type(launched):
    code, started, _ = launched(SCENES, "--config.optim.clip=2", "--config.data.eval_resize=96")
    assert code == 0
    assert started.values["optim"]["clip"] == 2.0 and started.values["data"]["eval_resize"] == 96
    code, started, errors = launched(SCENES, "--config.data.eval_resize=1.5")
    assert (code, started) == (2, None) and "config.data.eval_resize=1.5" in errors


def test_none_unsets_a_setting_and_the_row_tells_it(launched):
    unset = "--config.train.steps=None", "--config.train.epochs=2", "--config.model.width=none"
    code, started, errors = launched(SCENES, *unset)
    assert (code, "warning" in errors) == (0, False)
    assert (started.values["train"]["steps"], started.values["train"]["epochs"]) == (None, 2.0)
    assert started.values["model"]["width"] is None
    assert started.overrides == {"train.epochs": 2.0, "train.steps": None, "model.width": None}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optim.lr", "config.optim.lr=None: expected float"),
        ("train.stepz", 'Did you mean "steps"'),
        ("train.steps", "set exactly one of them"),
    ],
)
def test_what_must_be_set_is_not_unset(launched, monkeypatch, setting, said):
    code, started, errors = launched(SCENES, f"--config.{setting}=None")
    if started is not None:
        with pytest.raises(ValueError) as refused:
            resolve(started.values, 100)
        errors = str(refused.value)
    assert said in errors


def test_what_said_not_set_in_version_0_1_still_does_with_a_word(launched):
    old = "--config.train.steps=0", "--config.train.epochs=1", "--config.data.data_dir="
    code, started, errors = launched(SCENES, *old)
    assert code == 0 and started.values["train"]["steps"] is None
    assert started.values["data"]["data_dir"] is None
    assert "warning: --config.train.steps=0 is taken as None" in errors
    assert errors.count("warning") == 2


@pytest.mark.parametrize("name", OLD)
def test_the_forms_of_both_versions_are_each_others(name):
    values = config(name)
    before = old_settings.as_before(values)
    assert old_settings.as_before(before) == before
    assert kept(before) == kept(OLD[name])


@dataclass(frozen=True)
class Group(OptimSpec):
    """A group.

    Attributes:
      warmup: another line, which takes two
        lines. And a second sentence.  extra: one on the same line.
    """

    extra: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
      a: something that has to be given.
    """

    a: int
    group: Group = without("lr", "auto")


def test_a_config_is_made_of_dataclasses():
    made = to_config(Job)
    assert made.a is None and made.get_type("a") is int
    assert "lr" not in made.group and made.group.b1 == OptimSpec.b1
    assert made.group.extra is None and made.group.get_type("extra") is tuple
    made.group.extra = (1, 2)
    with pytest.raises(TypeError):
        made.group.extra = 1


def test_lines_come_from_docstrings_the_extended_class_included():
    told = describe(Job)
    assert told["group.warmup"] == ("int", "another line, which takes two lines.")
    assert told["group.extra"] == ("tuple[int, ...] | None", "one on the same line.")
    assert told["group.start_lr"] == ("float", "first learning rate.")
    assert told["a"] == ("int", "something that has to be given.")


def test_every_job_says_what_its_settings_are():
    for name in JOBS:
        assert "name" in describe(find(name).settings)
