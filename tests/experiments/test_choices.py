"""A sweep over nothing, or twice over the same, is refused by name before anything is opened."""

import importlib

import pytest

from common.config import ConfigError
from experiments.jobs import find
from experiments.shared.run import Run

SWEEPS = {
    "metaopt.robustness": ("methods", "grid.rates", "grid.seeds"),
    "metaopt.mnist_table1": ("grid.rates", "grid.seeds"),
    "sinks.perplexity": ("policies", "cache_sizes", "sinks"),
    "sinks.speed": ("policies", "cache_sizes"),
    "sinks.streameval": ("policies", "cache_sizes"),
    "sinks.qa_stream": ("policies", "cache_sizes"),
    "sinks.pretrain": ("variants", "evaluate.sinks"),
}


def smoke(config):
    paper, name = config.split(".")
    return importlib.import_module(f"experiments.{paper}.configs.{name}").get_config("smoke")


def refusal(config, setting, values, tmp_path):
    made = smoke(config)
    made.update_from_flattened_dict({setting: values})
    with pytest.raises(ConfigError) as refused:
        find(made.job)(Run(made.to_dict(), tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    return str(refused.value)


@pytest.mark.parametrize(
    ("config", "setting"), [(c, setting) for c, settings in SWEEPS.items() for setting in settings]
)
def test_an_empty_list_and_a_repetition_are_refused(config, setting, tmp_path):
    name = setting.rpartition(".")[2]
    assert f"{name}=(): give at least one" in refusal(config, setting, (), tmp_path)
    first = smoke(config).to_dict()
    for key in setting.split("."):
        first = first[key]
    twice = (*first, first[0])
    assert f"{name} has {first[0]!r} twice" in refusal(config, setting, twice, tmp_path)


def test_a_row_of_table_1_is_given_once(tmp_path):
    rows = ("SGD(0.01)", "SGD(0.01)")
    said = refusal("metaopt.mnist_table1", "rows", rows, tmp_path)
    assert "rows has 'SGD(0.01)' twice" in said
