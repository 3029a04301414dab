"""Which version of the code is running, for a result row."""

import importlib.metadata
import json
import os
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

    "+dirty" follows where tracked code differs from it or a package holds a module that git does not track. Outside a
    checkout it is the commit that pip installed from, or "v" and the installed version. "unknown" where none of these
    can be told, as in a checkout on a machine without git.
    """
    root = next((p for p in HERE.parents if (p / ".git").exists()), None)
    if root is not None:
        try:
            _git(root, "ls-files", "--error-unmatch", str(HERE))  # not somebody else's checkout
            dirty = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
            dirty = dirty or _untracked(root)
            return _git(root, "rev-parse", "HEAD") + ("+dirty" if dirty else "")
        except FileNotFoundError:  # no git on this machine: nobody knows what is checked out
            if root == HERE.parents[1]:
                return "unknown"
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


def _installed() -> str:
    try:
        distribution = importlib.metadata.distribution("triptych")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
    if Path(str(distribution.locate_file("common/commit.py"))).resolve() != HERE:
        return "unknown"  # a copy of the tree, next to another installed one
    source = json.loads(distribution.read_text("direct_url.json") or "{}")
    return source.get("vcs_info", {}).get("commit_id") or f"v{distribution.version}"
