"""Config paths of version 0.1, which work until 0.3: experiments/configs/PAPER/ is now experiments/PAPER/configs/."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

_OLD = re.compile(r"^(--?config=)?(.*?)experiments/configs/(jepa|sinks|metaopt)/(\w+\.py)")


def renewed(argv: Sequence[str]) -> list[str]:
    """The command with the present path of a config that has moved, and a line on stderr that names it.

    A path at which a file still lies is left alone.
    """
    return [_renewed(argument) for argument in argv]


def _renewed(argument: str) -> str:
    found = _OLD.match(argument)
    if found is None:
        return argument
    flag, above, paper, name = found.groups()
    if Path(f"{above}experiments/configs/{paper}/{name}").exists():
        return argument
    path = f"{above}experiments/{paper}/configs/{name}"
    print(
        f"warning: this config is now {path}; the old path works until version 0.3", file=sys.stderr
    )
    return f"{flag or ''}{path}{argument[found.end() :]}"
