"""From untyped settings to frozen dataclasses: strict keys, checked types, and errors that name the nearest key."""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, its value, and what to change."""


def unknown_key(key: str, known, where: str) -> ConfigError:
    """The error for a misspelt key, with the nearest known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(known)}"
    return ConfigError(f"{where}{key} is not a setting; {hint}")


def build(cls: type[T], values: Mapping[str, Any], where: str = "config.") -> T:
    """A dataclass from a mapping.

    Raises:
      ConfigError: an unknown key (nearest name suggested), a missing one, a value of the wrong type, or whatever
        ValueError the dataclass itself raises.
    """
    assert is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.init}
    for key in values:
        if key not in known:
            raise unknown_key(key, known, where)
    arguments = {}
    for name, field in known.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{where}{name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{where}{name} is missing")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where.rstrip('.')}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError(errors[-1])
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r}: expected a group of settings")
        return build(typing.cast(type, hint), value, f"{where}.")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}={value!r}: expected a sequence")
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, where) for v in value)
        if len(value) != len(args):
            raise ConfigError(f"{where}={value!r}: expected {len(args)} values")
        return tuple(_convert(a, v, where) for a, v in zip(args, value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise ConfigError(
            f"{where}={value!r}: expected {hint.__name__}, got {type(value).__name__}"
        )
    return value


def check_choices(**choices: Sequence[Any]) -> None:
    """Raises ValueError for a list of what to run, by its setting's name, that is empty or names something twice."""
    for name, values in choices.items():
        if not values:
            raise ValueError(f"{name}=(): give at least one")
        if twice := [v for i, v in enumerate(values) if v in values[:i]]:
            raise ValueError(f"{name} has {twice[0]!r} twice: give each once")


def parse_arg(arg: str, **defaults: Any) -> types.SimpleNamespace:
    """Parses a config file's argument, `name.py:smoke,batch=256`, against typed defaults.

    A bare word sets a boolean default to True. Values take their default's type. The result's `given` holds the names that
    `arg` sets, to any value.

    Raises:
      ConfigError: an unknown word, or a value that does not fit.
    """
    result, given = dict(defaults), set()
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            raise unknown_key(key, defaults, "config argument ")
        default = defaults[key]
        given.add(key)
        if isinstance(default, bool):
            choices = {"": True, "true": True, "1": True, "false": False, "0": False}
            if text.lower() not in choices or (equals and not text):
                raise ConfigError(f"config argument {item!r}: expected {key} or {key}=true|false")
            result[key] = choices[text.lower()]
            continue
        if not equals:
            raise ConfigError(f"config argument {key!r} needs a value: {key}={default!r}")
        try:
            result[key] = type(default)(text)
        except ValueError:
            raise ConfigError(
                f"config argument {item!r}: expected {type(default).__name__}"
            ) from None
    return types.SimpleNamespace(**result, given=frozenset(given))
