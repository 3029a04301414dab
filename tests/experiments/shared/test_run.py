"""A workdir belongs to one config: others are refused or told, what is done stays done, and the row says what ran."""

import copy
import json
import time

import jax
import pytest

from common.checkpoint import Checkpointer
from common.config import ConfigError
from common.results import append_row, config_hash, make_row, read_rows
from experiments.shared import clock
from experiments.shared.clock import Clock
from experiments.shared.run import Run, job

VALUES = {
    "job": "trained",
    "name": "small",
    "optim": {"lr": 1e-3, "b1": 0.9},
    "data": {"name": "scenes", "data_dir": "", "crop": (0.3, 1.0), "workers": 0},
    "train": {"steps": 40, "seed": 0, "log_every": 10, "eval_every": 0, "save_every": 10,
              "accumulate": 1, "profile_start": 10, "profile_steps": 0},
    "mesh": {"replica": 1, "fsdp": -1},
    "checkpoint": {"keep": 2},
    "writers": {"wandb": False},
}  # fmt: skip


def config(**changes):
    """VALUES with other settings, by their names with "__" for the dots; None takes one away."""
    values = copy.deepcopy(VALUES)
    for name, value in changes.items():
        *groups, last = name.split("__")
        group = values
        for key in groups:
            group = group[key]
        if value is None:
            del group[last]
        else:
            group[last] = value
    return values


def train(workdir, values=VALUES, until=40, **how):
    """A job that saves every step in a file, and stops before the end where asked to; (exit code, whether it ran)."""
    ran = []

    @job()
    def body(run):
        ran.append(True)
        state = run.workdir / "state"
        start = int(state.read_text()) if state.exists() else None
        run.begin(start)
        state.write_text(str(until))
        if until < 40:
            return 75
        run.finish(run.row({"loss": 0.5}, seeds=[0], steps=40))
        return 0

    return body(Run(values, workdir, **how)), bool(ran)


def files(workdir):
    return {p.name: p.read_bytes() for p in sorted(workdir.iterdir())}


def rows(workdir):
    return read_rows(workdir / "results.jsonl")


def test_other_settings_are_refused_by_name_before_anything_happens(tmp_path):
    train(tmp_path, until=20)
    before = files(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        train(tmp_path, config(optim__lr=0.05, data__crop=(0.5, 1.0)))
    assert str(refusal.value).splitlines() == [
        f"{tmp_path} holds a run with other settings:",
        "  config.optim.lr: saved 0.001, now 0.05",
        "  config.data.crop: saved [0.3, 1.0], now [0.5, 1.0]",
        "Take another --workdir, or go on with the new settings on purpose: --resume=changed (what decides the stream of "
        "training data, or the shapes of the state, cannot change)",
    ]
    assert files(tmp_path) == before


def test_a_change_on_purpose_is_in_the_row_for_good(tmp_path):
    train(tmp_path, until=20)
    faster = config(optim__lr=0.05)
    assert train(tmp_path, faster, until=30, resume="changed") == (75, True)
    assert train(tmp_path, faster) == (0, True)  # from here on it is the run's config
    (row,) = rows(tmp_path)
    assert row.changes == ({"step": 20, "config.optim.lr": [1e-3, 0.05]},)
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 0.05
    with pytest.raises(ConfigError, match=r"config\.optim\.lr: saved 0\.05, now 0\.001"):
        train(tmp_path)


def test_changes_of_every_start_are_kept_and_a_change_back_within_a_step_is_none(tmp_path):
    train(tmp_path, until=20)
    change = {"resume": "changed", "until": 20}
    train(tmp_path, config(optim__lr=0.05), **change)
    train(tmp_path, config(optim__lr=0.07, optim__b1=0.8), resume="changed", until=30)
    train(tmp_path, config(optim__lr=0.07, optim__b1=0.5), resume="changed")
    assert rows(tmp_path)[0].changes == (
        {"step": 20, "config.optim.lr": [1e-3, 0.07], "config.optim.b1": [0.9, 0.8]},
        {"step": 30, "config.optim.b1": [0.8, 0.5]},
    )
    other = tmp_path / "other"
    train(other, until=20)
    train(other, config(optim__lr=0.05), **change)
    train(other, resume="changed")
    assert rows(other)[0].changes == ()


def test_a_state_older_than_a_change_has_not_seen_it(tmp_path):
    """The newest checkpoint was damaged: the run goes on from the one before, with the new settings from there."""
    train(tmp_path, until=20)
    train(tmp_path, config(optim__lr=0.05), until=30, resume="changed")
    (tmp_path / "state").write_text("10")
    train(tmp_path, config(optim__lr=0.05))
    assert rows(tmp_path)[0].changes == ({"step": 10, "config.optim.lr": [1e-3, 0.05]},)


def test_nothing_was_changed_on_the_way_where_no_state_was_taken_over(tmp_path):
    train(tmp_path, until=20)
    (tmp_path / "state").unlink()  # killed before its first save
    train(tmp_path, config(optim__lr=0.05), resume="changed")
    assert rows(tmp_path)[0].changes == ()


def test_how_and_where_it_runs_is_free_to_change(tmp_path):
    train(tmp_path, until=20)
    free = config(
        mesh__replica=4, mesh__fsdp=2, train__accumulate=2, data__workers=3, data__data_dir="/x",
        train__log_every=1, train__eval_every=5, train__save_every=7, train__profile_steps=2,
        train__profile_start=3, checkpoint__keep=9, writers__wandb=True,
    )  # fmt: skip
    assert train(tmp_path, free) == (0, True)
    assert rows(tmp_path)[0].changes == ()
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["replica"] == 4
    assert train(tmp_path, VALUES) == (0, False), "and it is done for all of them"


def test_what_is_done_is_not_done_again(tmp_path, caplog):
    assert train(tmp_path) == (0, True)
    before = files(tmp_path)
    with caplog.at_level("INFO", logger="triptych"):
        assert train(tmp_path) == (0, False)
    assert f"done before: the result lies in {tmp_path}/result.json" in caplog.text
    assert files(tmp_path) == before
    with pytest.raises(ConfigError, match=r"config\.train\.seed: saved 0, now 1"):
        train(tmp_path, config(train__seed=1))
    assert files(tmp_path) == before


def test_a_finished_run_can_be_made_longer_on_purpose(tmp_path):
    train(tmp_path)
    longer = config(train__steps=80)
    assert train(tmp_path, longer, until=30, resume="changed") == (75, True)
    assert train(tmp_path, longer) == (0, True), "the old result is not that of the new config"
    assert train(tmp_path, longer) == (0, False)
    assert [len(row.changes) for row in rows(tmp_path)] == [0, 1]


def test_a_row_lost_between_two_files_is_put_back(tmp_path):
    train(tmp_path)
    (row,) = rows(tmp_path)
    (tmp_path / "results.jsonl").unlink()
    assert train(tmp_path) == (0, False) and rows(tmp_path) == [row]


def test_a_workdir_of_another_version_names_gone_settings(tmp_path):
    train(tmp_path, config(train__old={"a": 1}), until=20)
    with pytest.raises(ConfigError) as refusal:
        train(tmp_path)
    assert "\n  config.train.old.a: saved 1, now nothing\n" in str(refusal.value)
    train(tmp_path, resume="changed")
    (change,) = rows(tmp_path)[0].changes
    assert change["config.train.old.a"] == [1, None]


def test_a_workdir_of_an_older_version_gets_new_settings_and_says_so(tmp_path, caplog):
    train(tmp_path, config(optim__b1=None), until=20)
    (tmp_path / "run.json").unlink()  # it wrote none
    with pytest.raises(ConfigError, match=r"config\.optim\.b1: saved nothing, now 0\.8"):
        train(tmp_path, config(optim__b1=0.8), overrides={"optim.b1": 0.8})
    assert train(tmp_path, until=30) == (75, True)
    assert "is of an older version; new settings: config.optim.b1=0.9" in caplog.text
    assert train(tmp_path) == (0, True)
    (change,) = rows(tmp_path)[0].changes
    assert change["step"] == 20 and change["config.optim.b1"] == [None, 0.9]
    assert change["commit"] == ["unknown", Run(VALUES, tmp_path).commit]


def test_what_an_older_version_has_done_is_not_done_again(tmp_path):
    old = config(optim__b1=None)
    train(tmp_path, old)
    assert train(tmp_path) == (0, False)


def test_a_result_of_an_older_version_is_known_by_the_hash_of_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    old = make_row(job="trained", config="small", metrics={}, seeds=[0], steps=40, wall_seconds=1.0,
                   resolved=VALUES)  # fmt: skip
    for row, done in ((old, True), (make_other(old), False)):
        (tmp_path / "result.json").write_text(json.dumps(row.__dict__))
        assert Run(VALUES, tmp_path).done() == done


def make_other(row):
    import dataclasses

    return dataclasses.replace(row, config_hash=config_hash({"optim": 1}))


@pytest.mark.parametrize("text", ["", '{"optim": ', "[1]"])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json is no"):
        train(tmp_path)


def test_rows_without_a_config_must_be_of_this_one(tmp_path):
    other = make_row(
        job="trained", config="small", metrics={}, seeds=[0], steps=1, wall_seconds=1.0
    )
    append_row(tmp_path / "results.jsonl", other)
    with pytest.raises(ConfigError, match=r"results\.jsonl has rows of another config"):
        train(tmp_path)


def sweep(workdir, values, **how):
    @job(only=("methods",))
    def body(run):
        run.begin(0)
        return 0

    return body(Run(values, workdir, **how))


def test_a_sweep_may_get_more_parts_but_no_other_settings(tmp_path):
    values = {"job": "sweep", "name": "s", "methods": ["sgd"], "epochs": 3}
    sweep(tmp_path, values)
    more = {**values, "methods": ["sgd", "adam"]}
    with pytest.raises(
        ConfigError, match=r"config\.methods: saved \['sgd'\].*\n.*--resume=changed"
    ):
        sweep(tmp_path, more)
    assert sweep(tmp_path, more, resume="changed") == 0
    with pytest.raises(ConfigError, match=r"belongs to one config\.epochs, so that cannot change"):
        sweep(tmp_path, {**more, "epochs": 4}, resume="changed")


def test_the_row_says_what_was_started(tmp_path):
    how = {"config": "experiments/configs/x/small.py", "arg": "smoke,model=/home/me/model",
           "overrides": {"optim.lr": 1e-3, "data.name": "folder:/home/me/images"}}  # fmt: skip
    train(tmp_path, **how)
    (row,) = rows(tmp_path)
    assert (row.job, row.config, row.arg) == ("trained", "small", "smoke,model=model")
    assert row.overrides == {"optim.lr": 1e-3, "data.name": "folder:images"}
    assert (row.processes, row.devices) == (1, 1)
    assert "/home" not in (tmp_path / "result.json").read_text()


def test_wall_seconds_are_of_all_parts(tmp_path):
    train(tmp_path, until=20)
    saved = json.loads((tmp_path / "clock.json").read_text())
    assert saved["trained"] > 0
    (tmp_path / "clock.json").write_text(json.dumps({"trained": 1000.0}))
    train(tmp_path)
    assert 1000 < rows(tmp_path)[0].wall_seconds < 1100


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run = Run(VALUES, tmp_path / "run")
    run.begin()
    run.finish(run.row({}, seeds=[0], steps=1))
    assert not (tmp_path / "run").exists()


def test_a_copy_of_the_checkpoints_alone_still_knows_its_config(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as saver:
        saver.save(3, {"x": jax.numpy.zeros(2)}, {"config": VALUES}, wait=True)
    with pytest.raises(ConfigError, match=r"config\.optim\.lr: saved 0\.001, now 0\.05"):
        train(tmp_path, config(optim__lr=0.05))
    train(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 1e-3


@pytest.mark.parametrize("text", ["", "[1]", "{}"])
def test_a_damaged_result_is_named(tmp_path, text):
    train(tmp_path)
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ConfigError, match=f"{tmp_path}/result.json is no result"):
        train(tmp_path)


def test_a_change_of_code_on_the_way_is_told(tmp_path, monkeypatch):
    from experiments.shared import run

    monkeypatch.setattr(run, "find_commit", lambda: "first")
    train(tmp_path, until=20)
    monkeypatch.setattr(run, "find_commit", lambda: "second")
    train(tmp_path)
    (row,) = rows(tmp_path)
    assert row.commit == "second"
    assert row.changes == ({"step": 20, "commit": ["first", "second"]},)


def test_a_kill_costs_the_seconds_since_the_last_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "HEARTBEAT", 0.02)
    path, deadline = tmp_path / "clock.json", time.monotonic() + 60
    with Clock(path, "part"):
        while json.loads(path.read_text())["part"] < 0.05 and time.monotonic() < deadline:
            time.sleep(0.01)
        left = path.read_text()  # as a process that was killed now leaves it
    path.write_text(left)
    assert Clock(path, "part").seconds >= 0.05 and Clock(path, "another").seconds < 0.05


def test_a_clock_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clock, "write_json", full)
    with Clock(tmp_path / "clock.json", "part") as running:
        assert running.seconds >= 0
