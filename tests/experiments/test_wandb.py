"""The config says what W&B is told: its project, and every setting."""

import pytest

from experiments.jepa.pretrain import _wandb
from experiments.jepa.settings import WriterSettings


@pytest.mark.parametrize(
    ("setting", "variable", "project"),
    [(None, None, "triptych"), (None, "team", "team"), ("mine", "team", "mine")],
)
def test_the_project_is_a_setting_or_a_variable(monkeypatch, setting, variable, project):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_PROJECT", variable)
    writers = WriterSettings(tensorboard=False, wandb=True, wandb_project=setting)
    values = {"optim": {"lr": 1.0}}
    assert _wandb(writers, values) == {
        "project": project,
        "config": values,
    }


def test_without_it_nothing_is_told():
    assert _wandb(WriterSettings(), {}) is None
