"""A row's commit is that of the code that ran, wherever it was started from and whoever owns the checkout."""

import os
import shutil
import subprocess

import pytest

from common import commit
from common.commit import find_commit


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """(folder of a repository that tracks the code, function that calls git in it)."""
    folder = tmp_path / "checkout"
    for file in ("common/commit.py", "jepa/__init__.py", "experiments/jepa/__init__.py", "LOG.md"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    monkeypatch.setattr(commit, "HERE", folder / "common" / "commit.py")

    def git(*args):
        user = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", f"safe.directory={folder}"]
        done = subprocess.run(["git", "-C", folder, *user, *args], check=True, capture_output=True)
        return done.stdout.decode().strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "code")
    return folder, git


def test_it_is_the_head_from_any_folder(checkout, tmp_path, monkeypatch):
    folder, git = checkout
    monkeypatch.chdir(tmp_path)
    assert find_commit() == git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))  # as in a hook
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert len(find_commit()) == 40


def test_only_tracked_code_makes_it_dirty(checkout):
    folder, git = checkout
    head = git("rev-parse", "HEAD")
    (folder / "LOG.md").write_text("a line")
    (folder / "results.jsonl").write_text("{}")
    (folder / "notes.py").write_text("untracked")
    assert find_commit() == head
    (folder / "common" / "commit.py").write_text("changed")
    assert find_commit() == f"{head}+dirty"


@pytest.mark.parametrize("where", ["common/x.py", "experiments/configs/mine.py", "jepa/é/y.py"])
def test_a_module_that_is_not_tracked_makes_its_package_dirty(checkout, where):
    folder, git = checkout
    head = git("rev-parse", "HEAD")
    file = folder / where
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_name("notes.md").write_text("untracked, and no code")
    assert find_commit() == head
    file.write_text("untracked")
    assert find_commit() == f"{head}+dirty"
    (folder / ".git" / "info" / "exclude").write_text(f"{where}\n")
    assert find_commit() == head


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_checkout_of_another_user_is_still_one(checkout):
    folder, git = checkout
    head = git("rev-parse", "HEAD")
    for path in (folder, folder / ".git"):
        shutil.chown(path, 65534)
    assert find_commit() == head


def test_without_git_the_commit_of_a_checkout_is_not_known(checkout, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_commit() == "unknown"


def test_a_package_inside_somebody_elses_checkout_does_not_take_its_commit(checkout, monkeypatch):
    folder, _ = checkout
    inside = folder / ".venv" / "common" / "commit.py"
    inside.parent.mkdir(parents=True)
    inside.touch()
    monkeypatch.setattr(commit, "HERE", inside)
    assert find_commit() == "unknown"


@pytest.mark.parametrize(
    "source, found",
    [
        ('{"vcs_info": {"vcs": "git", "commit_id": "abc"}}', "abc"),
        ('{"dir_info": {}}', "v9.1"),
        (None, "v9.1"),
    ],
)
def test_an_installed_package_names_what_it_was_installed_from(
    tmp_path, monkeypatch, source, found
):
    class Installed:
        version = "9.1"

        def locate_file(self, path):
            return tmp_path / path

        def read_text(self, name):
            return source

    monkeypatch.setattr(commit, "HERE", tmp_path / "common" / "commit.py")
    monkeypatch.setattr(commit.importlib.metadata, "distribution", lambda name: Installed())
    assert find_commit() == found
