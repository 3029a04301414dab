"""The perplexity job from its config to its table; stopped in the middle of a stream, it gives the same rows."""

import json

import numpy as np
import pytest

from common.config import ConfigError
from common.distributed import EXIT_PREEMPTED, PreemptionGuard
from common.results import read_rows
from common.writers import read_metrics
from experiments.shared.run import Run
from experiments.sinks import perplexity as sinks_perplexity
from experiments.sinks.configs.perplexity import get_config
from sinks import perplexity
from tests.sinks.checkpoints import LLAMA, byte_level_folder, save, tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*perplexity", "ignore:.*reach position")


def settings(folder, arg="smoke", **changes):
    config = get_config(arg)
    config.update(model=str(byte_level_folder(folder / "model")), dtype="float32", **changes)
    return config.to_dict()


def metrics(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row["perplexity"], row["chunk_perplexity"]) for row in rows]


@pytest.mark.slow
def test_a_sweep_ends_in_a_row_per_setting_and_a_picture(tmp_path):
    values = settings(tmp_path, policies=("dense", "window", "recompute", "sinks"), sample=4)
    run = tmp_path / "run"
    assert sinks_perplexity.run(Run(values, run)) == 0
    names = ["dense", "recompute_16", "sinks_2+14", "window_0+16"]
    assert sorted(p.parent.name for p in run.glob("*/result.json")) == names
    assert (run / "perplexity.png").exists()
    assert [line.split("|")[1].strip() for line in (run / "table.md").read_text().splitlines()[2:]]
    result = json.loads((run / "sinks_2+14" / "result.json").read_text())["metrics"]
    assert result["tokens"] == 99
    np.testing.assert_allclose(result["nats"], np.log(result["perplexity"]))


@pytest.mark.slow
def test_a_stream_stopped_in_the_middle_goes_on_there(tmp_path, monkeypatch):
    values = settings(tmp_path, policies=("sinks",))
    assert sinks_perplexity.run(Run(values, tmp_path / "whole")) == 0
    monkeypatch.setattr(PreemptionGuard, "reached", lambda self, step: step == 2)
    assert sinks_perplexity.run(Run(values, tmp_path / "parts")) == EXIT_PREEMPTED
    monkeypatch.undo()
    assert (tmp_path / "parts" / "perplexity.png").exists(), "how far it came"
    assert not (tmp_path / "parts" / "sinks_2+14" / "result.json").exists()
    assert sinks_perplexity.run(Run(values, tmp_path / "parts")) == 0
    assert metrics(tmp_path / "parts" / "sinks_2+14") == metrics(tmp_path / "whole" / "sinks_2+14")


@pytest.mark.slow
def test_a_killed_stream_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    """Killed two chunks after a save: those are computed again, and the rows are those of a run left alone."""
    values = settings(tmp_path, policies=("sinks",), chunk=10, save_every=3)
    assert sinks_perplexity.run(Run(values, tmp_path / "whole")) == 0
    score = perplexity.score

    def killed(*args, **kw):
        for i, piece in enumerate(score(*args, **kw)):
            if i == 5:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(perplexity, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        sinks_perplexity.run(Run(values, tmp_path / "parts"))
    monkeypatch.undo()
    assert len(metrics(tmp_path / "parts" / "sinks_2+14")) == 5
    assert sinks_perplexity.run(Run(values, tmp_path / "parts")) == 0
    assert metrics(tmp_path / "parts" / "sinks_2+14") == metrics(tmp_path / "whole" / "sinks_2+14")


def test_another_texts_stream_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(PreemptionGuard, "reached", lambda self, step: step == 1)
    values = settings(tmp_path, policies=("sinks",))
    assert sinks_perplexity.run(Run(values, tmp_path / "run")) == EXIT_PREEMPTED
    with pytest.raises(ConfigError, match=r"config\.tokens: saved 100, now 80"):
        sinks_perplexity.run(Run(values | {"tokens": 80}, tmp_path / "run"))


@pytest.mark.slow
def test_a_text_or_weights_that_changed_under_their_name_are_refused(tmp_path, monkeypatch):
    """In the middle of a stream, and where the row is there; what is there stays."""
    text, run = tmp_path / "a.txt", tmp_path / "run"
    text.write_text("ab" * 100)
    values = settings(tmp_path, policies=("sinks",), text=str(text))
    wrong = r"config\.text=.*a\.txt: the text there is not what .*sinks_2\+14 was measured with"
    monkeypatch.setattr(PreemptionGuard, "reached", lambda self, step: step == 2)
    assert sinks_perplexity.run(Run(values, run)) == EXIT_PREEMPTED
    monkeypatch.undo()
    text.write_text("ba" * 100)
    with pytest.raises(ConfigError, match=wrong):
        sinks_perplexity.run(Run(values, run))
    text.write_text("ab" * 100)
    assert sinks_perplexity.run(Run(values, run)) == 0
    text.write_text("ba" * 100)
    with pytest.raises(ConfigError, match=wrong):
        sinks_perplexity.run(Run(values, run))
    text.write_text("ab" * 100)
    table = (run / "table.md").read_bytes()
    assert sinks_perplexity.run(Run(values, run)) == 0
    assert (run / "table.md").read_bytes() == table
    save(tmp_path / "model", LLAMA, tensors(LLAMA, seed=1))
    with pytest.raises(ConfigError, match=r"config\.model=.*: the weights there"):
        sinks_perplexity.run(Run(values, run))


@pytest.mark.slow
def test_what_is_finished_is_not_reported_under_another_config(tmp_path, capsys):
    values = settings(tmp_path, policies=("sinks",))
    assert sinks_perplexity.run(Run(values, tmp_path / "run")) == 0
    record = (tmp_path / "run" / "config.json").read_bytes()
    results = (tmp_path / "run" / "sinks_2+14" / "results.jsonl").read_bytes()
    other = values | {"seed": 5, "dtype": "bfloat16"}
    with pytest.raises(
        ConfigError, match=r"dtype: saved 'float32', now 'bfloat16'\n  config\.seed"
    ):
        sinks_perplexity.run(Run(other, tmp_path / "run"))
    with pytest.raises(ConfigError, match="so that cannot change"):
        sinks_perplexity.run(Run(other, tmp_path / "run", resume="changed"))
    assert (tmp_path / "run" / "config.json").read_bytes() == record
    assert sinks_perplexity.run(Run(values, tmp_path / "run")) == 0
    assert (tmp_path / "run" / "sinks_2+14" / "results.jsonl").read_bytes() == results

    # a workdir of an older version, whose config.json was overwritten by a second run
    (tmp_path / "run" / "config.json").write_text(json.dumps(other))
    with pytest.raises(
        ConfigError, match=r"sinks_2\+14/results.jsonl has rows of a part from another config"
    ):
        sinks_perplexity.run(Run(other, tmp_path / "run"))


@pytest.mark.slow
def test_another_policy_joins_the_table_on_purpose(tmp_path):
    values = settings(tmp_path, policies=("sinks",))
    assert sinks_perplexity.run(Run(values, tmp_path / "run")) == 0
    more = values | {"policies": ("sinks", "window")}
    with pytest.raises(ConfigError, match=r"config\.policies.*\n.*--resume=changed"):
        sinks_perplexity.run(Run(more, tmp_path / "run"))
    assert sinks_perplexity.run(Run(more, tmp_path / "run", resume="changed")) == 0
    table = (tmp_path / "run" / "table.md").read_text()
    assert table.count("| sinks 2+14 |") == table.count("| window 0+16 |") == 1
    (row,) = read_rows(tmp_path / "run" / "window_0+16" / "results.jsonl")
    assert (row.config, row.overrides) == (values["name"], {"setting": "window 0+16"})


@pytest.mark.slow
def test_a_text_shorter_than_the_cache_leaves_its_cell_empty(tmp_path):
    values = settings(tmp_path, policies=("sinks",), cache_sizes=(128,), tokens=20)
    assert sinks_perplexity.run(Run(values, tmp_path / "run")) == 0
    row = (tmp_path / "run" / "table.md").read_text().splitlines()[2]
    assert row.split("|")[3].strip() == ""


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"policies": ("streaming",)}, "policy 'streaming' is unknown"),
        ({"cache_sizes": (2,)}, "cache_size=2 leaves no room next to sinks=2"),
        ({"chunk": 0}, "chunk=0"),
        ({"text": "/no/such", "model": "/no/such/model"}, r"config\.text: text '/no/such'"),
        ({"tokens": 10**9}, r"config\.tokens=1000000000: the text has"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, changes, message):
    values = settings(tmp_path, policies=("sinks",)) | changes
    with pytest.raises(ConfigError, match=message):
        sinks_perplexity.run(Run(values, tmp_path / "run"))
