"""A new paper is a package, a folder in experiments/, a row in the registry of jobs, and a name in the import contracts.

What is written here is all that a paper needs; WORKSPACE.md ("Adding a paper") says the same in words.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from common.commit import packages
from common.results import read_rows

ROOT = Path(__file__).parents[2]
CONFIG = "experiments/toy/configs/line.py"

RECIPE = '''
"""A line through points, by least squares."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from common.metrics import mean


@dataclass(frozen=True)
class Line:
    """A recipe (common/recipe.py) for batches of x [B, width] and y [B]."""

    width: int
    lr: float

    def init(self, key):
        return {"w": jax.random.normal(key, (self.width,))}

    def init_extra(self, params):
        return {}

    @property
    def tx(self):
        return optax.sgd(self.lr)

    def loss(self, params, extra, batch, key):
        error = (batch["x"] @ params["w"] - batch["y"]) ** 2
        return error.mean(), {"loss": mean(error)}

    def update_extra(self, extra, params, step):
        return extra

    def param_axes(self, abstract):
        return jax.tree.map(lambda _: ("embed",), abstract)

    def extra_axes(self, abstract):
        return {}

    def log(self, opt_state, step):
        return {}
'''

JOB = '''
"""Job "toy_pretrain": fits a line."""

from dataclasses import dataclass

import jax
import numpy as np

from common.checkpoint import Checkpointer
from common.config import ConfigError, build
from common.data import LoaderSpec, array_source, fingerprint, prefetch_to_device, train_batches
from common.mesh import MeshSpec, make_mesh
from common.sharding import batch_sharding
from common.train_loop import TrainSpec, train
from common.writers import make_writer
from experiments.shared.run import Run, job
from toy import Line


@dataclass(frozen=True)
class Settings:
    job: str
    name: str
    train: TrainSpec
    mesh: MeshSpec
    width: int = 4
    lr: float = 0.3


@job()
def run(run: Run) -> int:
    settings = build(Settings, run.values)
    if settings.width < 1:
        raise ConfigError(f"config.width={settings.width}: at least 1")
    spec, mesh = settings.train, make_mesh(settings.mesh)
    x = np.random.default_rng(0).standard_normal((256, settings.width)).astype(np.float32)
    source = array_source(x=x, y=x.sum(1))
    loader = LoaderSpec(spec.batch, spec.seed)

    def batches(start):
        found = train_batches(source, loader, start_step=start)
        return prefetch_to_device(found, batch_sharding(mesh), batch=spec.batch)

    def open_writer(step):
        run.begin(None if step < 0 else step)
        return make_writer(
            run.workdir, spec.steps, restored_step=step, items_per_step=spec.batch, unit="points"
        )

    with Checkpointer(run.workdir / "checkpoints") as saver:
        state, seconds = train(
            Line(settings.width, settings.lr),
            spec,
            mesh=mesh,
            batches=batches,
            open_writer=open_writer,
            checkpointer=saver,
            workdir=run.workdir,
            meta={"config": run.values, "data": fingerprint(source, loader)},
        )
    error = float(abs(jax.device_get(state.params["w"]) - 1).max())
    row = run.row({"error": error}, seeds=[spec.seed], steps=spec.steps, seconds=seconds)
    run.finish(row)
    return 0
'''

SETTINGS = '''
"""A line through points.

Arguments: smoke.
"""

from common.config import parse_arg
from experiments.shared.settings import to_config
from experiments.toy.pretrain import Settings


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False)
    config = to_config(Settings)
    config.update(job="toy_pretrain", name="line")
    config.train.update(steps=20 if args.smoke else 2000, batch=32, log_every=5)
    return config
'''


@pytest.fixture
def tree(tmp_path):
    """A copy of the code without results."""
    for name in packages(ROOT):
        skip = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def replace(path: Path, old: str, new: str, times: int) -> None:
    text = path.read_text()
    assert text.count(old) == times, f"{path.name}: {old!r}"
    path.write_text(text.replace(old, new))


def add_toy(tree: Path) -> None:
    folder = tree / "experiments" / "toy"
    (folder / "configs").mkdir(parents=True)
    (tree / "toy").mkdir()
    (tree / "toy" / "__init__.py").write_text(RECIPE)
    (folder / "__init__.py").touch()
    (folder / "pretrain.py").write_text(JOB)
    (folder / "configs" / "__init__.py").touch()
    (folder / "configs" / "line.py").write_text(SETTINGS)
    row = '    "jepa_pretrain": "experiments.jepa.pretrain:run",\n'
    ours = '    "toy_pretrain": "experiments.toy.pretrain:run",\n'
    replace(tree / "experiments" / "jobs.py", row, row + ours, 1)
    replace(tree / "pyproject.toml", "jepa | sinks | metaopt", "jepa | sinks | metaopt | toy", 2)
    old = 'root_packages = ["common", "jepa", "sinks", "metaopt", '
    replace(tree / "pyproject.toml", old, old + '"toy", ', 1)


def python(tree: Path, *command: str) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": str(tree), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def contracts(tree: Path) -> tuple[int, str]:
    return python(tree, "-c", "from importlinter.cli import lint_imports_command as c; c()")


@pytest.mark.slow
def test_a_toy_paper_runs_its_smoke_and_keeps_the_contracts(tree):
    add_toy(tree)
    workdir = tree / "runs" / "line"
    command = ("-m", "experiments.launch", f"--config={CONFIG}:smoke", f"--workdir={workdir}")
    code, said = python(tree, *command)
    assert code == 0, said
    (row,) = read_rows(workdir / "results.jsonl")
    assert (row.job, row.config, row.arg, row.steps) == ("toy_pretrain", "line", "smoke", 20)
    assert row.metrics["error"] < 0.01, "the line was not fitted"
    assert "\ntoy_pretrain line in " in f"\n{said}", "a log has no prefix"
    code, said = contracts(tree)
    assert code == 0, said

    # Its rules hold for it as for the others.
    recipe, job = tree / "toy" / "__init__.py", tree / "experiments" / "toy" / "pretrain.py"
    recipe.write_text(recipe.read_text() + "import ml_collections\n")
    job.write_text(job.read_text() + "import experiments.jepa.probes\n")
    code, said = contracts(tree)
    assert code and "toy -> ml_collections" in said, said
    assert "experiments.toy is not allowed to import experiments.jepa" in said, said


def test_every_package_is_under_the_contracts():
    """A paper that is left out of them would be under none, without a word."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = " | ".join(linter["contracts"][0]["layers"]).split(" | ")
    assert set(linter["root_packages"]) == set(layers) == set(packages(ROOT))
