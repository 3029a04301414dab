"""The job with its images on the device: it trains, and its checkpoint is not mixed with the host's draws."""

import jax
import pytest

from common.config import ConfigError
from common.writers import read_metrics
from experiments.jepa import pretrain
from experiments.jepa.configs import scenes
from experiments.shared.run import Run


@pytest.fixture
def values(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])
    values = scenes.get_config("smoke").to_dict()
    values["data"]["on_device"] = True
    values["train"] |= {"steps": 4, "steps_per_dispatch": 2, "log_every": 2, "eval_every": 0}
    values["probe"]["linear"] = False
    return values


@pytest.mark.slow
def test_it_trains_several_steps_a_dispatch_and_goes_on_with_its_own_draws_alone(values, tmp_path):
    assert pretrain.run(Run(values, tmp_path)) == 0
    losses = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in losses] == [1, 3, 4] and all(0 < r["loss"] < 10 for r in losses)
    on_host = {**values, "data": {**values["data"], "on_device": False}}
    on_host["train"] = {**values["train"], "steps": 6}
    with pytest.raises(
        ConfigError, match=r"trained on other data.*\n.*transforms: saved.*DeviceBatch"
    ):
        pretrain.run(Run(on_host, tmp_path, resume="changed"))


def test_masks_of_the_released_collator_are_refused_by_name(values, tmp_path):
    values["masks"].update(mode="paper", min_keep=1)
    with pytest.raises(ConfigError, match=r"masks.mode='paper'.*on_device=False"):
        pretrain.run(Run(values, tmp_path))
    assert not any(tmp_path.iterdir())
