"""The speed job from its config to its table, on a small model."""

import json

import pytest

from common.config import ConfigError
from experiments import sinks_speed
from experiments.configs.sinks.speed import get_config
from tests.sinks.checkpoints import byte_level_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*perplexity")


def settings(folder, **changes):
    config = get_config("smoke")
    config.update(model=str(byte_level_folder(folder / "model")), **changes)
    return config.to_dict()


def test_every_policy_and_size_is_timed(tmp_path):
    assert sinks_speed.run(settings(tmp_path, batch=2), tmp_path / "run") == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    for policy in sinks_speed.POLICIES:
        assert metrics[f"ms_per_token/{policy}/32"] > 0
    assert metrics["cache_bytes/sinks_int8/32"] < metrics["cache_bytes/sinks/32"]
    assert (tmp_path / "run" / "speed.png").exists()
    assert (tmp_path / "run" / "table.md").read_text().count("\n") == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"policies": ("dense",)}, "'dense'"),
        ({"cache_sizes": (4,)}, "recent=0"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        sinks_speed.run(settings(tmp_path) | changes, tmp_path / "run")
