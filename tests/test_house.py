"""The rules of the house that no linter knows: short functions and files, no import circles, plain English."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "jepa", "sinks", "metaopt", "experiments")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in FILES}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def test_no_file_is_longer_than_400_lines():
    tests = sorted((ROOT / "tests").rglob("*.py"))
    long = {str(p): n for p in [*FILES, *tests] if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_no_function_is_longer_than_60_lines():
    """From its first line to its last, docstring included. Configs are lists of settings."""
    long = {
        f"{path}: {node.name}": lines
        for path, tree in TREES.items()
        if "configs" not in path.parts
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS) and (lines := node.end_lineno - node.lineno + 1) > 60
    }
    assert not long


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.Module, known: set[str]) -> set[str]:
    """Our modules that a module imports, also inside its functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            names |= inner or {node.module}
    return names & known


def test_modules_do_not_import_each_other_in_a_circle():
    modules = {module_name(path): tree for path, tree in TREES.items()}
    graph = {name: imported(tree, set(modules)) - {name} for name, tree in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))
    assert "common.train_step" in graph["common.train_loop"], "the graph is of our imports"


# Only these know what a program is built for: where a form is chosen, and where the machine itself is the subject.
MACHINES = ("mesh", "distributed", "flops", "results", "cpu_heap")
NAMES = {
    "default_backend",
    "platform_dependent",
    "optimization_barrier",
    "with_layout_constraint",
    "pallas",
}
BACKENDS = {"cpu", "gpu", "tpu", "cuda", "rocm"}


def backends(tree: ast.AST) -> set[str]:
    """What in a module's code (comments and docstrings are none) names a backend or asks for one."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in BACKENDS:
            found.add(repr(node.value))
        elif isinstance(node, ast.keyword) and node.arg in BACKENDS:
            found.add(f"{node.arg}=")
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.names:
            found |= {alias.name for alias in node.names} & {*NAMES, *BACKENDS}
        elif isinstance(node, ast.Attribute) and node.attr == "platform":
            of_python = isinstance(node.value, ast.Name) and node.value.id == "sys"
            found |= set() if of_python else {".platform"}
    return found


def test_only_ops_and_cpu_name_a_backend():
    """In the libraries. The Pallas kernel is TPU code itself."""
    known = {f"common/{name}.py" for name in MACHINES} | {"sinks/kernel.py"}
    naming = {
        str(path): found
        for path, tree in TREES.items()
        if path.parts[0] != "experiments" and path.name not in ("ops.py", "cpu.py")
        if str(path) not in known and (found := backends(tree))
    }
    assert not naming
    assert "'cpu'" in backends(TREES[Path("common/nn/ops.py")])


# Quaint words, and the plain ones: again, from where, so that ... not, forever, on the way, computed or read, of that
# time, next to or with.
BANNED = re.compile(
    r"\b(anew|whence|lest|for ever|in passing|(is|are|was|were|be) had|of then|thereof|wherein|whereof|withal|hence|"
    r"amid|upon|beside|gone on from)\b",
    re.IGNORECASE,
)
OPENINGS = ("Of ", "By their ", "Beside ")


def test_code_is_written_in_plain_english():
    found = [
        f"{path.relative_to(ROOT)}:{i}: {hit[0]}"
        for path in FILES
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if (hit := BANNED.search(line))
    ]
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if text.startswith(OPENINGS):
                    found.append(f"{path}: {text.splitlines()[0]}")
    assert not found


# The journal is a log: it stays as it was written.
DOCUMENTS = {str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]}


@pytest.mark.parametrize("name", sorted(DOCUMENTS - {"docs/journal.md"}))
def test_documents_are_written_in_plain_english(name):
    lines = (ROOT / name).read_text().splitlines()
    assert not [f"{i}: {hit[0]}" for i, x in enumerate(lines, 1) if (hit := BANNED.search(x))]
