"""`make` finds a Python that is new enough, and says so where there is none; libtpu stays out of the main environment."""

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
        command = [MAKE, "-C", str(ROOT), f"VENV={tmp_path / 'venv'}", f"TPU={tmp_path / 'tpu'}"]
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
def test_libtpu_is_installed_into_an_environment_of_its_own(make, tmp_path, target):
    done = make({"python3": True}, "-n", target)
    assert "tpu]" in done.stdout and f"{tmp_path}/venv" not in done.stdout
    rest = make({}, "-n", "reproduce", "test", "test-peers", "check", "notebooks", "bench")
    assert "tpu]" not in rest.stdout and f"{tmp_path}/venv" in rest.stdout
    assert f"{tmp_path}/tpu" in make({}, "-n", "clean").stdout
