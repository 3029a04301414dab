"""What the tests ask of XLA: a jaxlib that does not know a flag ends the process before any test."""

import importlib.metadata
import os
import runpy
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.mark.parametrize(
    ("version", "known"), [("0.10.2", True), ("0.11.2", False), ("0.12.0.1", False)]
)
def test_a_flag_is_set_only_where_jaxlib_knows_it(monkeypatch, version, known):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    runpy.run_path(str(CONFTEST))
    assert ("--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]) == known
