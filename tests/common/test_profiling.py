"""A trace covers the asked window and nothing else, and memory is reported in bytes."""

import jax
import jax.numpy as jnp
import pytest

from common.profiling import ProfileWindow, annotate, device_memory


@pytest.fixture
def calls(monkeypatch):
    log = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: log.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: log.append("stop"))
    return log


def traced(window, log, steps):
    """The steps that run while a trace is on."""
    on = []
    for step in steps:
        window(step)
        if log.count("start") > log.count("stop"):
            on.append(step)
    return on


@pytest.mark.parametrize(
    "steps, expected",
    [(range(10), [3, 4]), (range(4, 10), [4]), (range(5, 10), []), (range(4), [3])],
    ids=["from the start", "resumed inside", "resumed after", "ends inside"],
)
def test_the_window_is_traced_once(tmp_path, calls, steps, expected):
    window = ProfileWindow(tmp_path, 3, 5)
    assert traced(window, calls, steps) == expected
    window.close()
    window.close()
    assert calls == (["start", "stop"] if expected else [])


def test_an_empty_window_is_refused(tmp_path):
    with pytest.raises(ValueError, match="start=5 and stop=5"):
        ProfileWindow(tmp_path, 5, 5)


@pytest.mark.slow
def test_a_real_trace_lands_in_the_workdir(tmp_path):
    window = ProfileWindow(tmp_path, 1, 2)
    for step in range(3):
        with annotate(step):
            out = jnp.ones(8) * step
        window(step, out)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_device_memory_is_the_fullest_device_and_empty_where_unknown(monkeypatch):
    assert device_memory() == {} or device_memory()["peak"] > 0

    class Chip:
        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return {"bytes_in_use": self.used, "peak_bytes_in_use": 2 * self.used}

    monkeypatch.setattr(jax, "local_devices", lambda: [Chip(3), Chip(5)])
    assert device_memory() == {"in_use": 5, "peak": 10}
