"""The metaopt jobs on the embedded digits: configs build, grids resume to the same numbers, rows and pictures appear."""

import dataclasses
import importlib
import json
import pkgutil

import jax
import numpy as np
import pytest

import experiments.metaopt.configs as folder
from common.config import ConfigError, build
from common.distributed import EXIT_PREEMPTED, PreemptionGuard
from common.results import read_rows
from common.train_loop import Preempted
from common.writers import read_metrics
from experiments.jobs import JOBS
from experiments.metaopt import grid_job as metaopt_job
from experiments.metaopt import reproduce as metaopt_digits
from experiments.metaopt import table1 as metaopt_table1
from experiments.metaopt.grid import Cell, GridSpec, Method, run_grid
from experiments.metaopt.methods import METHODS
from experiments.metaopt.tasks.mlp import mlp_task
from experiments.shared.run import Run

CONFIGS = sorted(name for _, name, _ in pkgutil.iter_modules(folder.__path__) if name != "base")
SPEC = GridSpec(epochs=2, batch=64, rates=(1e-3, 1.0), seeds=(0, 1), save_every=1)


def config(name: str, arg: str = "") -> dict:
    return importlib.import_module(f"experiments.metaopt.configs.{name}").get_config(arg).to_dict()


@pytest.fixture(scope="module")
def task():
    return mlp_task("digits", hidden=8, examples=256)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_size_builds(name):
    values = config(name)
    assert values["name"] == name and values["job"] in JOBS
    grid_job = values["job"] == "metaopt_grid"
    settings = build(metaopt_job.Settings if grid_job else metaopt_table1.Settings, values)
    rates = settings.grid.rates
    assert settings.grid.epochs >= 5 and settings.task.examples is None
    if grid_job:
        assert len(settings.methods) >= 4 and len(rates) >= 3
    if grid_job and settings.task.data == "mnist":
        assert min(rates) <= 1e-7 and max(rates) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["charrnn", "cifar10_resnet20", "gpt", "robustness"])
def test_smoke_trains_and_draws(name, tmp_path):
    values = config(name, "smoke")
    assert metaopt_job.run(Run(values, tmp_path)) == 0
    rows = read_rows(tmp_path / "results.jsonl")
    assert len(rows) == 4 and (tmp_path / "grid.png").stat().st_size > 10_000
    score = next(iter(rows[0].metrics))
    assert score == ("perplexity" if values["task"]["kind"] in ("charrnn", "gpt") else "error")


@pytest.mark.parametrize("task", ["mnist", "cifar10", "charrnn", "gpt"])
def test_robustness_on_every_task(task):
    small, full = config("robustness", f"task={task}"), config("robustness", f"task={task},full")
    part, whole = (build(metaopt_job.Settings, values) for values in (small, full))
    rates = part.grid.rates
    assert set(rates) <= set(whole.grid.rates) and (min(rates), max(rates)) == (1e-7, 10)
    assert whole.task.examples is None and (part.task.examples is None) == (task == "mnist")
    with pytest.raises(ConfigError, match="task='imagenet' is unknown; known: mnist, cifar10"):
        config("robustness", "task=imagenet")


@pytest.mark.parametrize("name", CONFIGS)
def test_smoke_leaves_what_the_argument_says(name):
    told = "seeds=3" if name == "mnist_table1" else "seeds=3,epochs=5"
    for arg in (f"smoke,{told}", f"{told},smoke"):
        values = config(name, arg)
        assert values["grid"]["seeds"] == (0, 1, 2) and values["grid"]["batch"] == 32
        assert values["grid"]["epochs"] == (2 if name == "mnist_table1" else 5)
    assert config(name, "smoke")["grid"]["seeds"] == (0,)
    for few in ("seeds=-1", "seeds=0", "smoke,seeds=-1"):
        with pytest.raises(ConfigError, match=r"config argument 'seeds=-?\d': at least 1"):
            config(name, few)


@pytest.mark.parametrize("name", ["robustness", "cifar10_resnet20", "charrnn"])
def test_no_epochs_are_refused(name):
    with pytest.raises(ConfigError, match="epochs=0"):
        build(metaopt_job.Settings, config(name, "epochs=0"))


@pytest.mark.parametrize("epoch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_stops_a_grid_with_its_state_saved(task, tmp_path, monkeypatch, epoch):
    spec = dataclasses.replace(SPEC, rates=(1e-3,), seeds=(0,), save_every=100)
    whole = run_grid(task, METHODS["sgd"], spec, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(PreemptionGuard, "reached", lambda self, step: step == epoch)
        with pytest.raises(Preempted, match=f"sgd: stopped by a signal after epoch {epoch}; the"):
            run_grid(task, METHODS["sgd"], spec, tmp_path / "parts")
    assert run_grid(task, METHODS["sgd"], spec, tmp_path / "parts") == whole
    for name in ("whole", "parts"):
        steps = [row["step"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        assert steps == [1, 2]


@pytest.mark.parametrize("what", ["grid", "table1", "digits"])
def test_a_job_that_a_signal_stops_says_so(tmp_path, monkeypatch, caplog, quick_grid, what):
    def stopped(*args):
        raise Preempted("sgd: stopped by a signal after epoch 1; the state is saved")

    for module in (metaopt_job, metaopt_table1):
        monkeypatch.setattr(module, "run_grid", stopped)
    jobs = {
        "grid": lambda: metaopt_job.run(Run(config("mnist_towers", "smoke"), tmp_path)),
        "table1": lambda: metaopt_table1.run(Run(config("mnist_table1", "smoke"), tmp_path)),
        "digits": lambda: metaopt_digits.run(tmp_path),
    }
    with caplog.at_level("WARNING", logger="triptych"):
        assert jobs[what]() == EXIT_PREEMPTED == 75
    assert "stopped by a signal" in caplog.text
    assert "start the same command again to continue" in caplog.text


@pytest.mark.slow
def test_a_stopped_grid_continues_to_the_same_numbers(task, tmp_path):
    method = METHODS["auto(sgd)"]
    whole = run_grid(task, method, SPEC, tmp_path / "whole")
    run_grid(task, method, dataclasses.replace(SPEC, epochs=1), tmp_path / "parts")
    parts = run_grid(task, method, SPEC, tmp_path / "parts")
    assert whole == parts and run_grid(task, method, SPEC, tmp_path / "parts") == whole
    assert [(c.seed, c.rate) for c in whole] == [(0, 1e-3), (0, 1.0), (1, 1e-3), (1, 1.0)]
    assert all(c.finite and 0 <= c.scores["error"] <= 1 for c in whole)


@pytest.mark.slow
def test_a_cell_is_the_run_it_would_be_alone(task, tmp_path):
    """Neither the other rates nor the other seeds of a grid change a run."""
    one = dataclasses.replace(SPEC, rates=(1.0,), seeds=(1,))
    for name in ("adam", "tower1(sgd)"):
        grid = run_grid(task, METHODS[name], SPEC, tmp_path / name)
        alone = run_grid(task, METHODS[name], one, tmp_path / f"{name}-alone")
        assert grid[3].train_loss == pytest.approx(alone[0].train_loss, rel=1e-4)


@pytest.mark.slow
def test_divergence_is_seen(task, tmp_path):
    broken = Method("broken", lambda rate: jax_nan(), in_state=False)
    (cell,) = run_grid(task, broken, GridSpec(1, 64, (1.0,)), tmp_path / "parameters")
    assert not cell.finite
    overflows = dataclasses.replace(
        task, score=lambda params: {"perplexity": np.inf * jax.numpy.ones(())}
    )
    (cell,) = run_grid(overflows, METHODS["sgd"], GridSpec(1, 64, (1e-3,)), tmp_path / "score")
    assert not cell.finite and np.isfinite(cell.train_loss)


def jax_nan():
    import optax

    return optax.GradientTransformation(
        lambda params: (),
        lambda grads, state, params=None: (jax.tree.map(lambda g: g * np.nan, grads), state),
    )


@pytest.mark.slow
def test_the_job_writes_rows_once(tmp_path, caplog):
    caplog.set_level("INFO", "triptych")
    values = config("mnist_towers", "smoke")
    for _ in range(2):
        assert metaopt_job.run(Run(values, tmp_path)) == 0
    rows = read_rows(tmp_path / "results.jsonl")
    assert [(r.overrides["method"], r.overrides["initial_rate"]) for r in rows] == [
        (m, rate) for m in values["methods"] for rate in values["grid"]["rates"]
    ]
    assert "auto(sgd)" in caplog.text


@pytest.fixture
def quick_grid(monkeypatch):
    """Grids that end at once, with an error that tells the number of epochs; the methods that were trained."""
    trained = []

    def run_grid(task, method, spec, workdir):
        trained.append(method.name)
        return [
            Cell(rate, seed, {"error": spec.epochs / 100}, 1.0, {"learning_rate": 0.1}, True)
            for seed in spec.seeds
            for rate in spec.rates
        ]

    for module in (metaopt_job, metaopt_table1):
        monkeypatch.setattr(module, "run_grid", run_grid)
    monkeypatch.setattr(metaopt_job, "draw_grid", lambda workdir, *_: workdir)
    return trained


def test_rows_of_a_grid_are_not_those_of_another(tmp_path, quick_grid):
    values = config("mnist_towers", "smoke")
    other = {**values, "grid": {**values["grid"], "epochs": 7}}
    run = lambda values, **how: metaopt_job.run(Run(values, tmp_path, **how))  # noqa: E731
    assert run({**values, "methods": ("sgd",)}) == 0
    with pytest.raises(ConfigError, match=r"config\.grid\.epochs: saved \d, now 7"):
        run({**other, "methods": ("sgd",)}, resume="changed")
    assert run({**values, "methods": ("sgd", "auto(sgd)")}, resume="changed") == 0
    assert quick_grid == ["sgd", "auto(sgd)"]
    rows = read_rows(tmp_path / "results.jsonl")
    assert len(rows) == 2 * len(values["grid"]["rates"])
    assert len({row.config_hash for row in rows}) == 1, "which methods there are is not in it"

    # a workdir of an older version: its config.json was overwritten by the second run
    (tmp_path / "config.json").write_text(json.dumps({**other, "methods": ("sgd",)}))
    with pytest.raises(ConfigError, match="rows of sgd from another config"):
        run({**other, "methods": ("sgd",)})


def test_a_grid_killed_between_two_rows_does_not_write_the_first_again(tmp_path, quick_grid):
    values = config("mnist_towers", "smoke") | {"methods": ("sgd",)}
    path = tmp_path / "results.jsonl"
    metaopt_job.run(Run(values, tmp_path))
    rows = read_rows(path)
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    metaopt_job.run(Run(values, tmp_path))
    assert [row.overrides for row in read_rows(path)] == [row.overrides for row in rows]
    assert len(rows) > 1 and read_rows(path)[0] == rows[0]


def test_lines_of_table_1_are_not_those_of_another_config(tmp_path, quick_grid):
    values = config("mnist_table1", "smoke")
    assert metaopt_table1.run(Run(values, tmp_path)) == 0
    done = list(quick_grid)
    assert metaopt_table1.run(Run(values, tmp_path)) == 0 and quick_grid == done
    other = {**values, "grid": {**values["grid"], "seeds": (5,)}}
    for resume in ("same", "changed"):
        with pytest.raises(ConfigError, match=r"config\.grid\.seeds: saved \[0.*\], now \[5\]"):
            metaopt_table1.run(Run(other, tmp_path, resume=resume))


@pytest.mark.slow
def test_table_1_reruns_each_tower_with_what_it_learned(tmp_path, caplog):
    caplog.set_level("INFO", "triptych")
    assert metaopt_table1.run(Run(config("mnist_table1", "smoke"), tmp_path)) == 0
    names = [row.overrides["row"] for row in read_rows(tmp_path / "results.jsonl")]
    assert names == ["SGD(0.01)", "SGD/SGD(0.01)", "SGD/SGD(0.01), rerun"]
    assert "5.44" in caplog.text  # the paper's, beside it


@pytest.mark.slow
def test_digits_draws_its_picture(tmp_path):
    spec = dataclasses.replace(
        metaopt_digits.SPEC, epochs=1, seeds=(0,), rates=(1e-2, 1.0), save_every=1
    )
    assert metaopt_digits.run(tmp_path, ("sgd", "auto(sgd)"), spec) == 0
    rows = read_rows(tmp_path / "results.jsonl")
    assert len(rows) == 4 and (tmp_path / "metaopt_digits.png").stat().st_size > 10_000


def test_a_setting_that_the_task_does_not_have_is_refused():
    values = config("robustness", "smoke")
    values["task"] |= {"length": 5}
    with pytest.raises(ConfigError, match="kind='mlp' takes no length: set it to None"):
        build(metaopt_job.Settings, values)


def test_unknown_method_and_setting():
    values = config("robustness", "smoke")
    with pytest.raises(ConfigError, match=r"has 'adm'; known: sgd, auto\(sgd\)"):
        build(metaopt_job.Settings, {**values, "methods": ("adm",)})
    with pytest.raises(ConfigError, match=r"rates=\(-1\.0,\) must be positive"):
        build(metaopt_job.Settings, {**values, "grid": {**values["grid"], "rates": (-1.0,)}})
