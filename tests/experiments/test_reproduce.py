"""`make reproduce` goes through its parts whatever one of them does, and says which failed."""

import pytest

from common.config import ConfigError
from common.distributed import EXIT_PREEMPTED
from experiments import jepa_scenes, metaopt_digits, reproduce, sinks_quick

MODULES = {"metaopt": metaopt_digits, "sinks": sinks_quick, "jepa": jepa_scenes}


@pytest.fixture
def parts(monkeypatch):
    """(names of the parts that ran, a function that sets what a part does)."""
    ran = []

    def behave(name, outcome):
        def run(workdir, **_):
            assert workdir.name == name
            ran.append(name)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(MODULES[name], "run", run)

    for name in MODULES:
        behave(name, 0)
    return ran, behave


def test_quickest_first(parts, tmp_path):
    ran, _ = parts
    assert reproduce.main([f"--workdir={tmp_path}"]) == 0
    assert ran == ["metaopt", "sinks", "jepa"]


def test_only_some(parts, tmp_path):
    ran, _ = parts
    assert reproduce.main([f"--workdir={tmp_path}", "--only=jepa, metaopt"]) == 0
    assert ran == ["metaopt", "jepa"]


@pytest.mark.parametrize("outcome", [ConfigError("no network"), 1])
def test_a_failing_part_is_named_and_the_others_run(parts, tmp_path, caplog, outcome):
    ran, behave = parts
    behave("sinks", outcome)
    with caplog.at_level("INFO", logger="triptych"):
        assert reproduce.main([f"--workdir={tmp_path}"]) == 1
    assert ran == ["metaopt", "sinks", "jepa"]
    assert "failed: sinks" in caplog.text


def test_preempted_stops_at_once(parts, tmp_path):
    ran, behave = parts
    behave("sinks", EXIT_PREEMPTED)
    assert reproduce.main([f"--workdir={tmp_path}"]) == EXIT_PREEMPTED
    assert ran == ["metaopt", "sinks"]


@pytest.mark.parametrize("flag", ["--only=dinosaur", "--seeds=0"])
def test_wrong_flags_are_named(parts, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        reproduce.main([flag])
    assert stop.value.code == 2
    assert flag.partition("=")[2] in capsys.readouterr().err
