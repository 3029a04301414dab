"""Settings: strict keys, checked types, errors that name the remedy."""

from dataclasses import dataclass

import pytest

from common.config import ConfigError, build, parse_arg


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    sizes: tuple[int, int] = (1, 2)


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner()
    flag: bool = False
    limit: int | None = None

    def __post_init__(self):
        if self.name == "bad":
            raise ValueError("name is bad")


def test_builds_nested_and_converts_what_is_lossless():
    got = build(Outer, {"name": "a", "inner": {"lr": 1, "sizes": [3, 4]}, "limit": None})
    assert got == Outer("a", Inner(1.0, (3, 4)))
    assert isinstance(got.inner.lr, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "iner": {}}, r"config\.iner is not a setting; did you mean config\.inner\?"),
        (
            {"name": "a", "inner": {"lrr": 1}},
            r"config\.inner\.lrr .* did you mean config\.inner\.lr\?",
        ),
        ({}, r"config\.name is missing"),
        ({"name": 3}, r"config\.name=3: expected str, got int"),
        ({"name": "a", "flag": 1}, r"config\.flag=1: expected bool"),
        ({"name": "a", "inner": {"sizes": (1, 2, 3)}}, r"config\.inner\.sizes.*expected 2 values"),
        ({"name": "a", "inner": 3}, r"config\.inner=3: expected a group"),
        ({"name": "a", "limit": "x"}, r"config\.limit='x': expected int"),
        ({"name": "bad"}, r"config: name is bad"),
    ],
)
def test_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, values)


def test_parse_arg_types_follow_the_defaults():
    args = parse_arg(
        "smoke,epochs=3,name=x,fast=false", smoke=False, epochs=1.5, name="", fast=True
    )
    assert (args.smoke, args.epochs, args.name, args.fast) == (True, 3.0, "x", False)
    assert args.given == {"smoke", "epochs", "name", "fast"}
    assert parse_arg("", smoke=False).smoke is False and not parse_arg("", smoke=False).given


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("smok", "smok is not a setting; did you mean config argument smoke"),
        ("epochs", "'epochs' needs a value"),
        ("epochs=x", "expected float"),
        ("smoke=maybe", "smoke=true|false"),
    ],
)
def test_parse_arg_refuses(arg, message):
    with pytest.raises(ConfigError, match=message):
        parse_arg(arg, smoke=False, epochs=1.0)
