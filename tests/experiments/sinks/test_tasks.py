"""StreamEval and the question stream from config to result, started twice, on a small model saved to disk."""

import json

import pytest

from common.config import ConfigError
from experiments.shared.run import Run
from experiments.sinks import tasks as sinks_tasks
from experiments.sinks.configs import qa_stream, streameval
from tests.sinks.checkpoints import byte_level_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*perplexity", "ignore:.*was trained for")
JOBS = {
    "streameval": (streameval, sinks_tasks.run_streameval, ["4+12", "0+16"], 2 * 4),
    "qa_stream": (qa_stream, sinks_tasks.run_qa_stream, ["alone", "4+60", "0+64"], 4),
}


def settings(job, folder, **changes):
    config = JOBS[job][0].get_config("smoke")
    config.update(model=str(byte_level_folder(folder / "model")), **changes)
    return config.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_every_policy_answers_every_question(job, tmp_path, monkeypatch):
    _, run, policies, asked = JOBS[job]
    values, workdir = settings(job, tmp_path), tmp_path / "run"
    assert run(Run(values, workdir)) == 0
    rows = [json.loads(line) for line in (workdir / "rows.jsonl").read_text().splitlines()]
    assert [row["policy"] for row in rows] == policies
    assert all(row["asked"] == asked and 0 <= row["right"] <= asked for row in rows)
    assert all(sum(of for _, of in row["kinds"].values()) == asked for row in rows)
    metrics = json.loads((workdir / "result.json").read_text())["metrics"]
    assert {f"accuracy/{policy}" for policy in policies} <= metrics.keys()
    assert (workdir / "accuracy.png").exists()

    # killed before the last row was whole: the others are not computed again
    (workdir / "result.json").unlink()
    text = (workdir / "rows.jsonl").read_text().splitlines(keepends=True)
    (workdir / "rows.jsonl").write_text("".join(text[:-1]) + text[-1][:20])
    computed = []
    answer = sinks_tasks._answer
    monkeypatch.setattr(sinks_tasks, "_answer", lambda *a: computed.append(a[-1]) or answer(*a))
    assert run(Run(values, workdir)) == 0
    assert computed == policies[-1:]
    again = json.loads((workdir / "result.json").read_text())["metrics"]
    assert again == metrics
    with pytest.raises(ConfigError, match=r"config\.samples: saved \d+, now 99"):
        run(Run(values | {"samples": 99}, workdir))


@pytest.mark.parametrize(
    "job, changes, message",
    [
        ("streameval", {"policies": ("sinks", "alone")}, "policies alone: known are sinks, window"),
        ("streameval", {"queries": 0}, "queries=0"),
        ("streameval", {"cache_sizes": (4,)}, "recent=0: at least 1"),
        ("qa_stream", {"questions": "none.jsonl"}, r"config\.questions: questions 'none\.jsonl'"),
        ("qa_stream", {"count": 0}, r"config\.count=0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(job, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        JOBS[job][1](Run(settings(job, tmp_path) | changes, tmp_path / "run"))
