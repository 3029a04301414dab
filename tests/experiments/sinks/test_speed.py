"""The speed job from its config to its table, on a small model."""

import json

import pytest

from common.config import ConfigError
from experiments.shared.run import Run
from experiments.sinks import speed as sinks_speed
from experiments.sinks.configs.speed import get_config
from tests.sinks.checkpoints import byte_level_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*perplexity")


def settings(folder, **changes):
    config = get_config("smoke")
    config.update(model=str(byte_level_folder(folder / "model")), **changes)
    return config.to_dict()


@pytest.mark.slow
def test_every_policy_and_size_is_timed(tmp_path):
    assert sinks_speed.run(Run(settings(tmp_path, batch=2), tmp_path / "run")) == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    for policy in sinks_speed.POLICIES:
        assert metrics[f"ms_per_token/{policy}/32"] > 0
    assert metrics["cache_bytes/sinks_int8/32"] < metrics["cache_bytes/sinks/32"]
    assert (tmp_path / "run" / "speed.png").exists()
    assert (tmp_path / "run" / "table.md").read_text().count("\n") == 4


@pytest.mark.slow
def test_a_stopped_job_keeps_what_it_measured(tmp_path, monkeypatch):
    values, real, calls = settings(tmp_path), sinks_speed._median, []

    def median(step, n):
        calls.append(n)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(step, n)

    monkeypatch.setattr(sinks_speed, "_median", median)
    with pytest.raises(KeyboardInterrupt):
        sinks_speed.run(Run(values, tmp_path / "run"))
    first = json.loads((tmp_path / "run" / "measured.json").read_text())["ms"]
    assert sinks_speed.run(Run(values, tmp_path / "run")) == 0
    assert len(first) == 2 and len(calls) == 3 + len(sinks_speed.POLICIES) * 2 - 2
    after = json.loads((tmp_path / "run" / "measured.json").read_text())["ms"]
    assert first.items() <= after.items()
    with pytest.raises(ConfigError, match=r"config\.batch: saved 1, now 2"):
        sinks_speed.run(Run(values | {"batch": 2}, tmp_path / "run"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"policies": ("dense",)}, "'dense'"),
        ({"cache_sizes": (4,)}, "recent=0"),
        ({"batch": 0}, "batch=0"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": "float16"}, r"config\.dtype: dtype='float16': parameters load as"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        sinks_speed.run(Run(settings(tmp_path) | changes, tmp_path / "run"))
