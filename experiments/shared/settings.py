"""A job's settings, from its frozen dataclasses: the config, and what `--help` says of each."""

import inspect
import re
import typing
from collections.abc import Collection, Iterator
from dataclasses import MISSING, Field, field, fields, is_dataclass
from types import NoneType
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference


def without(*names: str) -> Any:
    """A group of settings without these fields of its dataclass, which follow from other settings."""
    return field(metadata={"without": names})


def to_config(cls: type, less: Collection[str] = ()) -> ConfigDict:
    """Every setting at its default. One that may be None, or has no default, is None of its type until it is set."""
    return ConfigDict({f.name: _default(f, hint) for f, hint in _settings(cls, less)})


def _default(f: Field, hint: Any) -> Any:
    if is_dataclass(hint):
        return to_config(typing.cast(type, hint), f.metadata.get("without", ()))
    default = None if f.default is MISSING else f.default
    kinds = [t for t in typing.get_args(hint) if t is not NoneType]
    if len(kinds) < len(typing.get_args(hint)):  # it may be None
        hint = kinds[0]
    elif default is not None:
        return default
    return FieldReference(default, field_type=typing.get_origin(hint) or hint)


def describe(cls: type, less: Collection[str] = ()) -> dict[str, tuple[str, str]]:
    """Full name, such as "optim.lr" -> the setting's type, and a line on it from the docstring of its dataclass."""
    found, lines = {}, _lines(cls)
    for f, hint in _settings(cls, less):
        if is_dataclass(hint):
            inner = describe(typing.cast(type, hint), f.metadata.get("without", ()))
            found |= {f"{f.name}.{name}": about for name, about in inner.items()}
        else:
            found[f.name] = inspect.formatannotation(hint), lines.get(f.name, "")
    return found


def _settings(cls: type, less: Collection[str]) -> Iterator[tuple[Field, Any]]:
    hints = typing.get_type_hints(cls)
    return ((f, hints[f.name]) for f in fields(cls) if f.name not in less)


def _lines(cls: type) -> dict[str, str]:
    """The first sentence on each attribute, in the docstrings of a class and of those that it extends."""
    found = {}
    for doc in filter(None, (c.__doc__ for c in reversed(cls.__mro__))):
        section = inspect.cleandoc(doc).partition("Attributes:\n")[2]
        section = re.split(r"\n(?=\S)", "\n" + section)[0]
        for entry in re.split(r"\n  (?=\w)|(?<=\S)  (?=\w+(?:, \w+)*: )", section):
            names, _, text = " ".join(entry.split()).partition(": ")
            found |= dict.fromkeys(names.split(", "), re.split(r"(?<=\.)\s", text)[0])
    return found
