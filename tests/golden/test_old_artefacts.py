"""Workdirs and saved streams of commit 1e20e9a: today's code goes on with each, or refuses it in one line.

v1e20e9a/runs.tar.xz holds what the code of that commit left (see v1e20e9a/make.py): runs that were stopped half-way, done
runs, and a saved chat. Here the same commands are started again. Since then, settings were added ("data.held_out"), paths of
configs have moved, and the state that metaopt keeps has changed; 0 and "" as "not set" may become None. None of that may
end in a traceback, nor in a run that begins from zero without a word.
"""

import json
import sys
import tarfile
from pathlib import Path

import jax
import pytest
from absl.testing import flagsaver

import sinks
from common.results import read_rows
from common.writers import read_metrics
from experiments import launch
from experiments.jepa import pretrain as jepa
from experiments.sinks import pretrain as language
from sinks import stream
from sinks.cache import CacheSpec
from sinks.conversation import Conversation
from sinks.sampling import Sampling
from tests.golden.v1e20e9a.make import RUNS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*perplexity", "ignore:.*reach position")


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v1e20e9a")
    with tarfile.open(ROOT / "tests" / "golden" / "v1e20e9a" / "runs.tar.xz") as packed:
        packed.extractall(folder, filter="data")
    return folder


@pytest.fixture
def again(artefacts, monkeypatch, capsys):
    """Starts a run again with the command that made it: (exit code, stderr without warnings)."""
    monkeypatch.chdir(artefacts)

    def again(name):
        config, settings, _ = RUNS[name]
        path = ROOT / "experiments" / "configs" / config
        argv = ["launch", f"--config={path}", f"--workdir={artefacts / name}", *settings]
        with monkeypatch.context() as patch, flagsaver.flagsaver():
            patch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
            code = launch.main(argv)
        lines = capsys.readouterr().err.splitlines()
        return code, [line for line in lines if not line.startswith("warning: ")]

    return again


def unchanged(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and ".held" not in p.name}


def told(row, step):
    """The change of version that the row has at this step, and no other."""
    (change,) = row.changes
    assert change["step"] == step and change["commit"][0] == "unknown", row.changes
    return change


@pytest.mark.slow
def test_a_pretraining_goes_on_where_it_stood(again, artefacts, monkeypatch):
    # What is measured in the end takes most of the time, and depends on no older version.
    monkeypatch.setattr(jepa, "online_monitor", lambda *_: lambda state: [("knn", 0.5)])
    before = (artefacts / "jepa" / "metrics.jsonl").read_text()
    (step,) = (int(path.name) for path in (artefacts / "jepa" / "checkpoints").iterdir())
    assert 0 < step < 5
    assert again("jepa")[0] == 0
    after = (artefacts / "jepa" / "metrics.jsonl").read_text()
    assert after.startswith(before)
    losses = [
        row["step"] for row in read_metrics(artefacts / "jepa" / "metrics.jsonl") if "loss" in row
    ]
    assert losses == [1, 2, 3, 4, 5]
    (row,) = read_rows(artefacts / "jepa" / "results.jsonl")
    assert row.steps == 5 and told(row, step)["config.probe.neighbors"] == [None, 20]


@pytest.mark.slow
def test_language_models_go_on_where_they_stood(again, artefacts, monkeypatch):
    monkeypatch.setattr(language, "measure", lambda *_: {"0+16": 2.0, "1+15": 1.0})
    done = (artefacts / "pretrain" / "vanilla" / "metrics.jsonl").read_text()
    before = (artefacts / "pretrain" / "zero" / "metrics.jsonl").read_text()
    assert again("pretrain")[0] == 0
    assert (artefacts / "pretrain" / "vanilla" / "metrics.jsonl").read_text() == done
    rows = read_metrics(artefacts / "pretrain" / "zero" / "metrics.jsonl")
    assert (artefacts / "pretrain" / "zero" / "metrics.jsonl").read_text().startswith(before)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    (row,) = read_rows(artefacts / "pretrain" / "results.jsonl")
    told(row, 0)


@pytest.mark.slow
def test_a_grid_goes_on_after_its_last_epoch(again, artefacts):
    before = (artefacts / "sgd" / "sgd" / "metrics.jsonl").read_text()
    assert before.count("\n") == 1
    assert again("sgd")[0] == 0
    after = (artefacts / "sgd" / "sgd" / "metrics.jsonl").read_text()
    assert after.startswith(before) and after.count("\n") == 2
    rows = read_rows(artefacts / "sgd" / "results.jsonl")
    assert [row.overrides["initial_rate"] for row in rows] == [1e-3, 1.0]
    told(rows[0], 0)


@pytest.mark.slow
def test_a_stream_goes_on_in_the_middle_of_its_text(again, artefacts):
    folder = artefacts / "perplexity"
    window = unchanged(folder / "window_0+16")
    before = (folder / "sinks_2+14" / "metrics.jsonl").read_text()
    assert again("perplexity")[0] == 0
    assert unchanged(folder / "window_0+16") == window
    after = (folder / "sinks_2+14" / "metrics.jsonl").read_text()
    assert before and after.startswith(before) and len(after) > len(before)
    (row,) = read_rows(folder / "sinks_2+14" / "results.jsonl")
    assert row.metrics["tokens"] == 99
    assert told(row, 0)["config.block"] == [None, 8]
    done = unchanged(folder)
    assert again("perplexity")[0] == 0, "and a third time"
    assert unchanged(folder / "window_0+16") == window
    assert (folder / "sinks_2+14" / "results.jsonl").read_bytes() == done[
        folder / "sinks_2+14" / "results.jsonl"
    ]


@pytest.mark.parametrize("name", ["streameval", "qa_stream"])
def test_questions_go_on_with_the_policy_that_is_left(again, artefacts, name):
    before = (artefacts / name / "rows.jsonl").read_text()
    assert again(name)[0] == 0
    after = (artefacts / name / "rows.jsonl").read_text()
    assert after.startswith(before) and after.count("\n") == before.count("\n") + 1
    (row,) = read_rows(artefacts / name / "results.jsonl")
    told(row, 0)


def test_speed_keeps_what_was_measured(again, artefacts):
    before = json.loads((artefacts / "speed" / "measured.json").read_text())["ms"]
    assert again("speed")[0] == 0
    after = json.loads((artefacts / "speed" / "measured.json").read_text())["ms"]
    assert len(after) == len(before) + 1 and before.items() <= after.items()


@pytest.mark.parametrize("name", ["grid_done", "attention_map"])
def test_what_is_done_stays_done(again, artefacts, name):
    before = unchanged(artefacts / name)
    assert again(name)[0] == 0
    after = unchanged(artefacts / name)
    rows = [path for path in before if path.suffix == ".jsonl"]
    assert rows and all(after[path] == before[path] for path in rows)


@pytest.mark.parametrize(
    "name", ["learned", "tower", "table1", pytest.param("jepa_auto", marks=pytest.mark.slow)]
)
def test_a_state_that_metaopt_no_longer_has_is_refused_in_one_line(again, artefacts, name):
    rows = [p for p in unchanged(artefacts / name) if p.suffix == ".jsonl"]
    before = {p: p.read_bytes() for p in rows}
    code, lines = again(name)
    assert code == 2, lines
    (line,) = lines
    assert line.startswith(f"error: {artefacts / name}") and "another version" in line
    assert "take another --workdir" in line
    assert {p: p.read_bytes() for p in rows} == before


def test_rows_that_no_config_tells_of_are_refused_in_one_line(again, artefacts):
    """The baselines alone left no config.json."""
    before = unchanged(artefacts / "jepa_baselines")
    code, lines = again("jepa_baselines")
    assert code == 2 and unchanged(artefacts / "jepa_baselines") == before
    (line,) = lines
    assert "has rows of another config" in line and "take another --workdir" in line


def test_a_saved_chat_is_refused_in_one_line(artefacts, monkeypatch):
    monkeypatch.chdir(artefacts)
    model = sinks.load("model")
    model = model._replace(params=stream.prepare(model.params))
    talk = Conversation(model, CacheSpec(2, 30), Sampling(1.0), jax.random.key(0))
    with pytest.raises(ValueError) as refusal:
        talk.load(str(artefacts / "chat"))
    (line,) = str(refusal.value).splitlines()
    assert line.startswith(f"{artefacts / 'chat'} was saved by another version")
    assert "/new" in line
    assert talk.length == 0
