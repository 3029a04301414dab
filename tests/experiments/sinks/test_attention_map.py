"""The attention_map job from its config to its pictures, on a small model saved to disk."""

import json

import numpy as np
import pytest

from common.config import ConfigError
from experiments.shared.run import Run
from experiments.sinks import attention_map as sinks_attention_map
from experiments.sinks.configs.attention_map import get_config
from tests.sinks.checkpoints import H, L, byte_level_folder


def settings(folder, **changes):
    config = get_config("smoke")
    config.update(model=str(byte_level_folder(folder / "model")), **changes)
    return config.to_dict()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*perplexity")  # the model is untrained
def test_the_job_draws_every_head(tmp_path):
    values = settings(tmp_path, sinks=2, recent=6)
    assert sinks_attention_map.run(Run(values, tmp_path / "run")) == 0
    for file in ("attention.png", "heads.png", "config.json", "results.jsonl"):
        assert (tmp_path / "run" / file).exists(), file
    maps = np.load(tmp_path / "run" / "maps.npz")
    assert maps["weight_LHTT"].shape == (L, H, 24, 24)
    np.testing.assert_allclose(maps["weight_LHTT"].sum(-1), 1, atol=1e-5)
    assert (maps["weight_LHTT"][:, :, 20, 2:14] == 0).all()  # forgotten
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert 0 < metrics["first_token_share"] < 1 and f"first_token_share_layer_{L - 1}" in metrics


@pytest.mark.filterwarnings("ignore:.*perplexity")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "smollm3"}, r"config\.model: 'smollm3' is no file"),
        ({"text": "nowhere"}, r"config\.text: text 'nowhere': no file"),
        ({"texts": 10**6}, r"config\.texts=1000000 of 24 tokens: embedded has"),
        ({"tokens": 2}, "tokens=2: at least"),
        ({"sinks": -1}, "sinks=-1"),
        ({"recnt": 1}, r"recnt is not a setting; did you mean config\.recent"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, changes, message):
    values = settings(tmp_path) | changes
    with pytest.raises(ConfigError, match=message):
        sinks_attention_map.run(Run(values, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
