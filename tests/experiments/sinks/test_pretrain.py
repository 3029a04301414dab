"""The pretraining job trains every variant, measures its stream, and goes on where it stood."""

import json

import jax
import pytest

from common.config import ConfigError
from experiments.shared.run import Run
from experiments.sinks import pretrain as sinks_pretrain
from experiments.sinks.configs.pretrain import get_config


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])


@pytest.mark.slow
def test_smoke_trains_and_measures_every_variant(tmp_path, monkeypatch):
    values = get_config("smoke").to_dict()
    assert sinks_pretrain.run(Run(values, tmp_path)) == 0
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    wanted = {f"{v}/{m}" for v in values["variants"] for m in ("0+16", "1+15", "sink share")}
    assert metrics.keys() == wanted
    assert all(1 < value < 1000 for key, value in metrics.items() if "+" in key)
    assert (tmp_path / "pretrain.png").exists() and "variant" in (tmp_path / "table.md").read_text()

    # started again, nothing is trained a second time
    def no_batches(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(sinks_pretrain, "train_batches", no_batches)
    assert sinks_pretrain.run(Run(values, tmp_path)) == 0
    assert json.loads((tmp_path / "result.json").read_text())["metrics"] == metrics


@pytest.mark.parametrize(
    "group, changes, message",
    [
        (None, {"variants": ("vanila",)}, "variant 'vanila': known are"),
        ("data", {"held_out": 1.0}, r"held_out=1\.0 in \(0, 1\)"),
        ("data", {"text": "nowhere"}, "text 'nowhere'"),
        ("data", {"length": 10**6}, "no text of 'python-topics' is that long"),
        ("model", {"heads": 5}, r"model\.width=32 must be a multiple of model\.heads=5"),
        ("optim", {"warmup": 99}, r"optim\.warmup=99 steps is longer"),
        ("evaluate", {"sinks": (16,)}, "recent=0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, group, changes, message):
    values = get_config("smoke").to_dict()
    (values if group is None else values[group]).update(changes)
    with pytest.raises(ConfigError, match=message):
        sinks_pretrain.run(Run(values, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
