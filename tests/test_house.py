"""The rules of the house that no linter knows: short functions and files, and no import circles."""

import ast
import graphlib
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
