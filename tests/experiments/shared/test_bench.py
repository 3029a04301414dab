"""The CPU benches' command: contenders take turns, and the row has their medians, ratios and shares of a limit."""

import pytest

from common.results import read_rows
from experiments.shared import bench


def test_the_row_has_what_the_workers_measured(tmp_path, monkeypatch, capsys):
    asked, out = [], tmp_path / "bench.jsonl"

    def worker(module, mode, *options, threads):
        asked.append((module, mode, *options))
        found = {"ours": 0.5, "peer_a": 1.0, "peer_b": 2.0}[mode]
        facts = {"limit": 20.0, "facts": {"size": 7.0}} if mode == "ours" else {}
        return {"seconds": [found, found, 9.0], **facts}

    monkeypatch.setattr(bench, "run_worker", worker)
    program = bench.Bench(
        "some.module", "", "bench_job", out, ("ours", "peer_a", "peer_b"), lambda mode, args: {}, unit="items",
        items=4, peers="peer", share="share_of_limit", steps=(3, "timed"),
    )  # fmt: skip
    assert program.main(["--rounds=2", "--write"]) == 0
    assert [mode for _, mode, *_ in asked] == ["ours", "peer_a", "peer_b"] * 2
    assert asked[0] == ("some.module", "ours", "--steps=3", "--official=")
    (row,) = read_rows(out)
    assert row.job == "bench_job" and row.steps == 6
    assert row.metrics["items_per_second_ours"] == 8 and row.metrics["ratio_ours"] == 2
    assert row.metrics["share_of_limit_ours"] == 0.4 and row.metrics["size_ours"] == 7
    assert "ratio_peer_a" not in row.metrics
    assert "2.00 x the peers' best" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main(["--modes=ours,theirs"])
    assert "{'theirs'} unknown; known: ours, peer_a, peer_b" in capsys.readouterr().err
