"""Which version of the code is running, for a result row."""

import importlib.metadata
import json
import os
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve()
# Files whose changes can change a result. Reports, notebooks and committed rows cannot.
CODE = ("*.py", "pyproject.toml", "constraints*.txt", ":(exclude)tests")


def packages(root: Path) -> list[str]:
    """The packages of this project that lie in `root`. A paper's is named as its folder in experiments/ is."""
    papers = (folder.name for folder in sorted((root / "experiments").glob("*/")))
    return ["common", "experiments", *(n for n in papers if (root / n / "__init__.py").exists())]


def find_commit() -> str:
    """The git commit of the checkout that this module lies in.

    "+dirty" follows where tracked code differs from it or a package holds a module that git does not track, "+unchecked"
    where git cannot be asked for that. Outside a checkout it is the commit that pip installed from, or "v" and the
    installed version, or "unknown".
    """
    root = next((p for p in HERE.parents if (p / ".git").exists()), None)
    if root is not None:
        try:
            _git(root, "ls-files", "--error-unmatch", str(HERE))  # not somebody else's checkout
            dirty = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
            dirty = dirty or _untracked(root)
            return _git(root, "rev-parse", "HEAD") + ("+dirty" if dirty else "")
        except FileNotFoundError:  # no git on this machine
            if root == HERE.parents[1] and (commit := _head(root)):
                return commit + "+unchecked"
        except subprocess.CalledProcessError:
            pass
    return _installed()


def _untracked(root: Path) -> bool:
    """Whether a package holds a module that git neither tracks nor ignores: an import, or --config, may have read it."""
    here = HERE.parents[1]
    folders = [f":(literal){here / name}" for name in packages(here)]
    found = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *folders)
    return any(name.endswith(".py") for name in found.split("\0"))


def _git(root: Path, *args: str) -> str:
    # A checkout may belong to another user (a mounted volume), and variables of a hook may name another repository.
    command = ["git", "--no-optional-locks", "-c", f"safe.directory={root}", "-C", str(root), *args]
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return done.stdout.strip()


def _head(root: Path) -> str:
    """HEAD's commit, from git's own files; "" where they are not understood."""
    try:
        folder = root / ".git"
        if folder.is_file():  # a worktree
            folder = root / folder.read_text().removeprefix("gitdir:").strip()
        head = (folder / "HEAD").read_text().strip()
        if head.startswith("ref:"):
            name, shared = head.removeprefix("ref:").strip(), folder
            if (folder / "commondir").exists():
                shared = folder / (folder / "commondir").read_text().strip()
            if (shared / name).exists():
                head = (shared / name).read_text().strip()
            else:
                packed = (shared / "packed-refs").read_text()
                head = next(
                    line.split()[0] for line in packed.splitlines() if line.endswith(f" {name}")
                )
    except (OSError, StopIteration):
        return ""
    return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else ""


def _installed() -> str:
    try:
        distribution = importlib.metadata.distribution("triptych")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
    if Path(str(distribution.locate_file("common/commit.py"))).resolve() != HERE:
        return "unknown"  # a copy of the tree, next to another installed one
    source = json.loads(distribution.read_text("direct_url.json") or "{}")
    return source.get("vcs_info", {}).get("commit_id") or f"v{distribution.version}"
