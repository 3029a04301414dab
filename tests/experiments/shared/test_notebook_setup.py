"""The notebooks' first cells: a GPU or TPU runtime gets the plugin of its chips, and a fall back to the CPU is told."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from experiments.shared import notebook_setup
from experiments.shared.notebook_setup import extra_of, fell_back, requirements, stale, unmet

ROOT = Path(__file__).parents[3]
NOTEBOOKS = sorted((ROOT / "experiments").glob("*/notebook.ipynb"))
NEW_GPU, OLD_DRIVER, OLD_GPU = "580.65.06, 7.5\n", "550.54.15, 8.9\n", "580.65.06, 7.0\n"


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize(
    ("env", "pci", "smi", "has", "extra"),
    [
        ({}, set(), "", {}, ""),
        ({"COLAB_GPU": ""}, {"0x0042"}, "", {}, ""),  # Google's network card is no chip
        ({"TPU_ACCELERATOR_TYPE": "v5e-1"}, set(), "", {}, "tpu"),
        ({}, {"0x0042", "0x0063"}, "", {}, "tpu"),
        ({}, set(), NEW_GPU, {}, "cuda"),
        ({}, set(), NEW_GPU * 8, {"jax-cuda13-plugin": "0.9.0"}, "cuda"),
        ({}, set(), OLD_DRIVER, {}, "cuda12"),
        ({}, set(), OLD_GPU, {}, "cuda12"),
        ({}, set(), NEW_GPU, {"jax-cuda12-plugin": "0.7.2"}, "cuda12"),  # as Colab comes
    ],
)
def test_the_extra_is_that_of_the_chips(env, pci, smi, has, extra):
    assert extra_of(env, pci, smi, has.get) == extra


def test_every_extra_is_one_of_the_projects():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {"tpu", "cuda", "cuda12", "notebooks"} <= set(extras)


def test_a_plugin_of_another_version_than_jax_is_missed():
    """As in Colab once jax alone has been upgraded."""
    here = {
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
    wanted = requirements(ROOT)
    assert unmet(wanted, "cuda12", {**here, "jax-cuda12-plugin": "0.7.2"}.get)[0] == (
        f"jax-cuda12-plugin<={here['jax']},>={here['jax']} (here 0.7.2)"
    )
    assert [n.partition("<")[0] for n in unmet(wanted, "cuda", here.get)] == ["jax-cuda13-plugin"]
    for libtpu in ({}, {"libtpu": "0.0.52"}):  # none, and one that this jax is not released with
        assert any(n.startswith("libtpu==") for n in unmet(wanted, "tpu", {**here, **libtpu}.get))


def test_an_old_jax_is_missed_and_a_whole_installation_is_not():
    wanted = requirements(ROOT)
    assert any(
        line.startswith("jax>=0.10.2 (here 0.7.2)")
        for line in unmet(wanted, "", lambda name: "0.7.2")
    )
    assert unmet(wanted, "", notebook_setup._version) == []


@pytest.mark.parametrize("pins", ["constraints.txt", "constraints-newest.txt"])
def test_both_ends_of_the_pinned_versions_meet_what_the_project_asks_for(pins):
    lines = [line for line in (ROOT / pins).read_text().splitlines() if line[0] != "#"]
    versions = dict(line.split("==") for line in lines)
    lookup = lambda name: versions.get(name.lower().replace("_", "-"))  # noqa: E731
    assert unmet(requirements(ROOT), "", lookup) == []


def test_libraries_that_changed_under_the_kernel_are_named():
    modules = {
        "jax": SimpleNamespace(__version__="0.7.2"),
        "numpy": SimpleNamespace(__version__="2.4.6"),
        "flax": None,
    }
    assert stale(modules, {"jax": "0.10.2", "numpy": "2.4.6"}.get) == ["jax 0.7.2 -> 0.10.2"]


def test_falling_back_to_the_cpu_is_told_unless_asked_for():
    assert "has a GPU, but jax runs on the CPU" in fell_back("cuda12", "cpu", "")
    assert "[tpu]" in fell_back("tpu", "cpu", "")
    assert not fell_back("cuda", "gpu", "") and not fell_back("", "cpu", "")
    assert not fell_back("cuda", "cpu", "cpu")


@pytest.fixture
def runtime(monkeypatch):
    """A GPU runtime with the given packages; returns the commands that are run."""
    commands, installed = [], {}
    monkeypatch.setattr(notebook_setup, "_version", installed.get)
    monkeypatch.setattr(notebook_setup, "_nvidia_smi", lambda: OLD_DRIVER)
    monkeypatch.setattr(notebook_setup, "_pci_devices", set)
    monkeypatch.setattr(
        notebook_setup.subprocess, "run",
        lambda command, **kwargs: commands.append(command) or SimpleNamespace(returncode=0),
    )  # fmt: skip
    return SimpleNamespace(commands=commands, installed=installed)


def test_colab_installs_the_extra_and_asks_for_a_restart(runtime, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    runtime.installed.update(jax="0.0.1")  # this process holds another one
    with pytest.raises(
        SystemExit, match=rf"Restart the session now .*jax {jax.__version__} -> 0\.0\.1"
    ):
        notebook_setup.prepare(ROOT)
    assert runtime.commands == [[sys.executable, "-m", "pip", "install", "-q", f"{ROOT}[cuda12]"]]


def test_elsewhere_nothing_is_installed_unasked(runtime, monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    with pytest.raises(SystemExit, match=r"Missing here: jax.*%pip install -e"):
        notebook_setup.prepare(ROOT)
    assert runtime.commands == []


def test_a_missing_plugin_elsewhere_is_a_warning(runtime, monkeypatch, capsys):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS")
    packages = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    lookup = lambda name: packages.get(name.lower().replace("-", "_"), packages.get(name.lower()))  # noqa: E731
    monkeypatch.setattr(notebook_setup, "_version", lookup)
    notebook_setup.prepare(ROOT)
    said = capsys.readouterr().out
    assert "this machine has a GPU, but jax runs on the CPU" in said and "[cuda12]" in said
    assert runtime.commands == []


def test_the_notebooks_share_their_address_and_setup():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    heads = {tuple(code_cells(path)[:2]) for path in NOTEBOOKS}
    assert len(heads) == 1
    space = {}
    exec(next(iter(heads))[0], space)
    assert space["ADDRESS"] == urls.get("Repository", "")


def run_head(folder, address=""):
    head = code_cells(NOTEBOOKS[0])[:2]
    head[0] = f"ADDRESS = {address!r}"
    env = os.environ | {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", "\n".join(head)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_without_a_project_the_cell_says_where_to_put_it(tmp_path):
    done = run_head(tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Set ADDRESS above" in done.stderr and "named triptych" in done.stderr


@pytest.mark.slow
def test_the_cell_takes_a_checkout_that_is_there_or_clones_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "triptych").symlink_to(ROOT)
    assert "jax " in run_head(tmp_path / "there").stdout
    source = tmp_path / "source"  # a repository with just what the cell needs
    for name in (
        "pyproject.toml",
        "experiments/__init__.py",
        "experiments/shared/notebook_setup.py",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text((ROOT / name).read_text())
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=source, check=True)
    (tmp_path / "new").mkdir()
    done = run_head(tmp_path / "new", f"file://{source}")
    assert done.returncode == 0 and "jax " in done.stdout, done.stderr
