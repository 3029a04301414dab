"""What `python -m experiments.launch --help` prints: the flags, the configs there are, and what a config can be told."""

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

EXPERIMENTS = Path(__file__).parents[1]
_HELP = {"-h", "-?", "-help", "--help", "--helpfull", "--helpshort"}
_WIDTH = 100


def wanted(argv: Sequence[str]) -> bool:
    """Whether the command asks for help."""
    return argv[1:] == ["help"] or bool(_HELP.intersection(argv[1:]))


def without_help(argv: Sequence[str]) -> list[str]:
    """The command without its calls for help."""
    return [argv[0], *(a for a in argv[1:] if a not in {*_HELP, "help"})]


def of_flags(doc: str, one: str) -> str:
    """`doc`, and the flags of the module that defines the flag `one`."""
    module = flags.FLAGS.find_module_defining_flag(one)
    known = [f for f in flags.FLAGS.get_flags_for_module(module) if "." not in f.name]
    rows = [_row(f"--{f.name}={_placeholder(f)}", f.help) for f in known]
    return "\n".join([doc, "flags:", *rows])


def of_configs() -> str:
    """The configs of this project, each with the first line that it says of itself."""
    rows = [_row(path.relative_to(EXPERIMENTS.parent), first) for path, first in _configs()]
    return "\n".join(["", "configs:", *rows])


def without_none(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command without its settings that are None, which flags of a type cannot take, and these settings' names."""
    found = {a: re.fullmatch(r"--?config\.([\w.]+)=[Nn]one", a) for a in argv}
    return [a for a in argv if not found[a]], [name[1] for name in found.values() if name]


def of_config(path: str, values: Mapping[str, Any], about: Mapping[str, tuple[str, str]]) -> str:
    """A config file's own words, and its settings: type, the value that this command gives, and a line (`about` it)."""
    doc = ast.get_docstring(ast.parse(Path(path).read_text())) or ""
    rows = [
        _row(f"--config.{name}={value!r}", " ".join(filter(None, (f"({kind})", line))))
        for name, value in _flat(values)
        for kind, line in [about.get(name, (type(value).__name__, ""))]
    ]
    return "\n".join(["", f"{path}:", "", doc, "", "settings, as this command has them:", *rows])


def _configs() -> Iterator[tuple[Path, str]]:
    for path in sorted(EXPERIMENTS.glob("*/configs/*.py")):
        tree = ast.parse(path.read_text())
        if any(
            isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in tree.body
        ):
            yield path, (ast.get_docstring(tree) or "").partition("\n")[0]


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def _placeholder(flag: flags.Flag) -> str:
    if flag.boolean:
        return "true|false"
    return "PATH.py[:ARG]" if flag.flag_type() == "config object" else flag.flag_type().upper()


def _row(name: object, text: str) -> str:
    lines = textwrap.wrap(text, _WIDTH - 4, break_long_words=False) or [""]
    if len(str(name)) <= 44 and len(lines) == 1 and len(lines[0]) <= _WIDTH - 46:
        return f"  {name!s:44s}  {lines[0]}"
    return "\n      ".join([f"  {name}", *lines])
