"""The notebooks' cells run, in order, on small settings."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import sinks
from sinks import loading
from tests.sinks.checkpoints import byte_level_folder

ROOT = Path(__file__).parents[2]
SMALL = {
    "metaopt": {"RATES": (1e-3,), "STEPS": 20},
    "sinks": {"TOKENS": 160, "CACHE": 32, "NEW_TOKENS": 4},
    "jepa": {"STEPS": 2, "BATCH": 8, "DEPTH": 1},
}


@pytest.fixture
def tiny_model(tmp_path, monkeypatch):
    """`sinks.load` of any name gives a small model with random weights."""
    folder = byte_level_folder(tmp_path / "model")
    monkeypatch.setattr(sinks, "load", lambda name: loading.load(folder, check=False))


def cells(name):
    """(source, is it the one with the settings) of every code cell."""
    notebook = json.loads((ROOT / "experiments" / name / "notebook.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None  # committed clean
            yield "".join(cell["source"]), "parameters" in cell["metadata"].get("tags", [])


def test_every_notebook_is_tested():
    assert {p.parent.name for p in (ROOT / "experiments").glob("*/notebook.ipynb")} == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_notebook_runs(name, tiny_model):
    matplotlib.use("Agg")
    space = {}
    for source, is_settings in cells(name):
        exec(compile(source, name, "exec"), space)
        if is_settings:
            assert set(SMALL[name]) <= set(space)
            space |= SMALL[name]
    matplotlib.pyplot.close("all")
    if name == "jepa":
        assert len(space["losses"]) == 2 and np.isfinite(space["losses"]).all()
        assert set(space["accuracy"]) == {"I-JEPA", "untrained", "raw pixels"}
    if name == "metaopt":
        assert space["values"].keys() >= {"learning_rate", "weight_decay", "b1"}
    if name == "sinks":
        assert int(space["drawn"].cache.length[0]) >= 32 + 100
