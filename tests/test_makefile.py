"""`make` finds a Python that is new enough or says so, gives each its pins, and keeps other chips' compilers apart."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")
OLD = "#!/bin/sh\nexit 1\n"  # as python3.10 answers whether it is 3.11 or newer


@pytest.fixture
def make(tmp_path):
    """Runs make with these Pythons on the PATH and no other: name -> this one, or an old one."""

    def make(pythons, *arguments):
        for name, new in pythons.items():
            if new:
                (tmp_path / name).symlink_to(sys.executable)
            else:
                (tmp_path / name).write_text(OLD)
                (tmp_path / name).chmod(0o755)
        places = {"VENV": "venv", "TPU": "tpu", "NEWEST": "newest"}
        command = [MAKE, "-C", str(ROOT), *(f"{k}={tmp_path / v}" for k, v in places.items())]
        return subprocess.run(
            [*command, *arguments],
            env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3.12": True}, "python3.12"),
        ({"python3.11": True, "python3.13": True, "python3": True}, "python3.11"),
        (
            {"python3.11": False, "python3": True},
            "python3",
        ),  # a shim of a version that is not there
        ({"python3": False, "python": True}, "python"),
    ],
)
def test_the_first_python_that_is_new_enough_is_taken(make, tmp_path, pythons, chosen):
    done = make(pythons, "-n", f"{tmp_path}/venv/bin/pip")
    assert done.returncode == 0 and f'"{chosen}" -m venv {tmp_path}/venv\n' in done.stdout, done


@pytest.mark.parametrize("argument", [[], ["PYTHON=python3"], ["PYTHON=/no/python"]])
def test_without_one_it_says_so(make, tmp_path, argument):
    done = make({"python3": False}, f"{tmp_path}/venv/bin/pip", *argument)
    assert done.returncode and "error: no Python 3.11 or newer" in done.stderr
    assert "PYTHON=/path/to/python" in done.stderr and not (tmp_path / "venv").exists()


@pytest.mark.parametrize("target", ["preflight", "test-aot"])
def test_the_compilers_for_other_chips_have_an_environment_of_their_own(make, tmp_path, target):
    done = make({"python3": True}, "-n", target)
    assert "preflight]" in done.stdout and f"{tmp_path}/venv" not in done.stdout
    rest = make({}, "-n", "reproduce", "test", "test-peers", "check", "notebooks", "bench")
    assert "preflight]" not in rest.stdout and f"{tmp_path}/venv" in rest.stdout
    cleaned = make({}, "-n", "clean").stdout
    assert f"{tmp_path}/tpu" in cleaned and f"{tmp_path}/newest" in cleaned


def fake_environment(path, version):
    """A virtual environment whose Python answers with this version, and whose pip prints its arguments."""
    (path / "bin").mkdir(parents=True)
    for name, line in {
        "python": f"import runpy, sys; sys.version_info = {version}; exec(sys.argv[2])",
        "pip": "import sys; print(*sys.argv[1:])",
    }.items():
        (path / "bin" / name).write_text(f"#!{sys.executable}\n{line}\n")
        (path / "bin" / name).chmod(0o755)


@pytest.mark.parametrize(
    ("version", "pins"),
    [
        ((3, 11, 7), "constraints.txt"),
        ((3, 12, 1), "constraints-newest.txt"),
        ((3, 13, 0), "constraints-newest.txt"),
    ],
)
def test_each_python_installs_the_versions_pinned_for_it(make, tmp_path, version, pins):
    fake_environment(tmp_path / "venv", version)
    (tmp_path / "touch").symlink_to(shutil.which("touch"))
    done = make({}, f"{tmp_path}/venv/base")
    assert done.returncode == 0 and f"-c {pins} -e ." in done.stdout, done


def test_an_environment_of_another_python_than_asked_for_is_refused(make, tmp_path):
    fake_environment(tmp_path / "venv", (3, 8, 0))
    done = make({"python3": True}, "same-python", "PYTHON=python3")
    assert done.returncode and f"{tmp_path}/venv holds Python 3.8, not Python 3." in done.stderr
    assert make({}, "same-python").returncode == 0  # no other one was asked for


def test_the_newest_stack_takes_python_3_12_and_says_where_it_is_missing(make, tmp_path):
    for given in ([], ["PYTHON312=/no/python"], ["PYTHON312=python3"]):
        done = make({"python3": False}, "test-newest", *given)
        assert (
            done.returncode
            and "error: no Python 3.12" in done.stderr
            and "pytest" not in done.stdout
        )
    fake_environment(tmp_path, (3, 12, 9))
    done = make({}, "-n", "test-newest", f"PYTHON312={tmp_path}/bin/python")
    assert f'"{tmp_path}/bin/python" -m venv {tmp_path}/newest\n' in done.stdout, done
    assert f"{tmp_path}/newest/bin/python -m pytest" in done.stdout
