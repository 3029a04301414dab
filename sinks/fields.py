"""What a file says about a model: a table of the fields that are used, with their types and ranges, checked in one go.

    KINDS = {"hidden_size": Field(count()), "head_dim": Field(count(), default=None, null=None)}
    settings = read(json, KINDS, "folder/config.json")

Fields that are not in the table are passed over: files carry many that no model needs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LARGEST = 2**31 - 1  # what an int32 holds: no size of a model is above it
REQUIRED: Any = object()
REFUSED: Any = object()


@dataclass(frozen=True)
class Kind:
    """What a value must be: `says` completes "must be ...", `holds` decides."""

    says: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Field:
    """One field of a file.

    Attributes:
      default: its value where the file does not have it; REQUIRED: the file must.
      null: what JSON's null stands for; REFUSED: it is no value.
    """

    kind: Kind
    default: Any = REQUIRED
    null: Any = REFUSED


def count(low: int = 1, high: int = LARGEST) -> Kind:
    """A whole number from `low` to `high`."""
    return Kind(f"a whole number from {low} to {high}", lambda v: _whole(v) and low <= v <= high)


def number(above: float, most: float, *, or_equal: bool = False) -> Kind:
    """A finite number in (above, most], or in [above, most] if `or_equal`."""
    says = f"a number from {above:g} to {most:g}" if or_equal else f"a number above {above:g}"
    says += "" if or_equal else f", at most {most:g}"

    def holds(v: Any) -> bool:
        if isinstance(v, bool) or not isinstance(v, int | float):
            return False
        return (v >= above if or_equal else v > above) and v <= most  # False for NaN

    return Kind(says, holds)


def one_of(*values: Any) -> Kind:
    """One of a few values, of the same type: True is not 1."""
    known = [(type(v), v) for v in values]
    says = " or ".join(_show(v) for v in values)
    return Kind(says, lambda v: _simple(v) and (type(v), v) in known)


def list_of(kind: Kind, what: str) -> Kind:
    """A list whose every value is of `kind`."""
    return Kind(f"a list of {what}", lambda v: isinstance(v, list) and all(map(kind.holds, v)))


FLAG = Kind("true or false", lambda v: isinstance(v, bool))
TEXT = Kind("text", lambda v: isinstance(v, str))
OBJECT = Kind("an object", lambda v: isinstance(v, dict))
NUMBERS = list_of(number(-math.inf, 3e38), "finite numbers")


def either(*kinds: Kind) -> Kind:
    """A check that any of `kinds` passes."""
    says = " or ".join(kind.says for kind in kinds)
    return Kind(says, lambda v: any(kind.holds(v) for kind in kinds))


def read(
    values: Mapping[str, Any], table: Mapping[str, Field], where: str, prefix: str = ""
) -> dict[str, Any]:
    """The table's fields by name, with defaults. `prefix` stands before their names in the file.

    Raises ValueError, one line with everything that is missing or not what it must be, behind `where`.
    """
    found, problems = {}, []
    for name, field in table.items():
        key = prefix + name
        value = values.get(key, field.default)
        if key not in values:
            if value is REQUIRED:
                problems.append(f"lacks {key}")
            found[name] = value
        elif value is None and field.null is not REFUSED:
            found[name] = field.null
        elif field.kind.holds(value):
            found[name] = value
        else:
            problems.append(f"{key}={_show(value)}, it must be {field.kind.says}")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")
    return found


def _whole(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)


def _simple(v: Any) -> bool:
    return v is None or isinstance(v, str | int | float | bool)


def shown(name: str) -> str:
    """A name out of a file as it can be printed: a damaged one may be long, or hold what moves a terminal's cursor."""
    return name if name.isprintable() and 0 < len(name) <= 200 else repr(name[:80])


def _show(value: Any) -> str:
    """A value as its file has it; of a long one, its kind or its beginning."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more than 4300 digits in a list
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
