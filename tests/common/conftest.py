"""Fixtures of the train loop's tests."""

import functools

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.common.line import run


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Every run here compiles the same few programs."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """steps -> the final state of a run with no trouble."""
    return functools.cache(lambda steps: run(tmp_path_factory.mktemp("clean"), steps))
