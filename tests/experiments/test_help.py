"""Every command teaches itself: `--help` prints its options and exits with 0."""

import importlib
import sys

import pytest
from absl.testing import flagsaver

from experiments import launch
from experiments.shared.old_paths import renewed

PARSERS = {
    "experiments.compare": ["--series", "--names", "--out"],
    "experiments.preflight": ["--config", "--all", "--topology", "--missing"],
    "experiments.reproduce": ["--only", "--workdir", "--seeds", "--epochs"],
    "experiments.tables": ["--results", "--out", "--check"],
    "common.data.__main__": ["prepare", "info"],
    "sinks.chat": ["--model", "--sinks", "--recent", "--seed"],
    "experiments.jepa.bench": ["--modes", "--rounds"],
    "experiments.sinks.bench": ["--modes", "--rounds"],
    "experiments.metaopt.bench": ["--contenders", "--rounds"],
}


@pytest.fixture
def help_of_launch(monkeypatch, capsys):
    def ask(*arguments):
        argv = ["launch", *arguments]
        with monkeypatch.context() as patch, flagsaver.flagsaver():
            patch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
            code = launch.main(argv)
        return code, *capsys.readouterr()

    return ask


@pytest.mark.parametrize("module", PARSERS)
def test_help_names_the_command_and_its_options(module, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(module).main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"python -m {module.removesuffix('.__main__')}" in said
    assert [option for option in PARSERS[module] if option not in said] == []


@pytest.mark.parametrize("word", ["--help", "-h", "--helpfull", "--helpshort", "-?", "help"])
def test_launch_lists_every_flag_and_every_config(help_of_launch, word):
    code, said, errors = help_of_launch(word)
    assert (code, errors) == (0, "")
    for flag in ("--config", "--workdir", "--coordinator", "--num_processes", "--process_id"):
        assert f"\n  {flag}=" in said
    for config in (
        "jepa/configs/cifar10.py",
        "sinks/configs/speed.py",
        "metaopt/configs/mnist_towers.py",
    ):
        assert f"\n  experiments/{config}\n" in said
    assert "/base.py" not in said and "/released.py" not in said, "these are no configs"


def test_launch_lists_what_a_config_can_be_told(help_of_launch):
    path = "experiments/jepa/configs/cifar10.py"
    code, said, _ = help_of_launch(f"--config={path}:epochs=7", "--config.optim.lr=0.5", "-h")
    assert code == 0
    assert "Arguments: smoke; epochs=N; seed=N" in said and "--workdir" in said
    assert "\n  --config.optim.lr=0.5                         (float) peak learning rate.\n" in said
    assert "\n  --config.train.epochs=7.0\n      (float | None) passes over" in said
    assert "\n  --config.data.crop_scale=(0.3, 1.0)\n      (tuple[float, float]) range of" in said
    assert said.count("\n  --config.") > 60


def test_help_for_a_config_that_is_wrong_says_so(help_of_launch):
    code, said, errors = help_of_launch("--config=experiments/jepa/configs/scenes.py:smok", "-h")
    assert code == 2 and "--workdir" in said
    assert "smok is not a setting" in errors and errors.count("\n") == 1


def test_the_path_of_a_config_that_has_moved_works_and_is_told(help_of_launch, tmp_path):
    old, new = "experiments/configs/jepa/scenes.py", "experiments/jepa/configs/scenes.py"
    code, said, errors = help_of_launch(f"--config={old}:smoke", "--config.optim.lr=0.5", "-h")
    assert (code, errors) == (
        0,
        f"warning: this config is now {new}; the old path works until version 0.3\n",
    )
    assert f"{new}:" in said and "0.5" in said
    assert renewed(["x", "--config", f"/src/{old}"])[2] == f"/src/{new}"
    mine = tmp_path / "experiments" / "configs" / "jepa" / "mine.py"
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert renewed([f"--config={mine}"]) == [f"--config={mine}"]
