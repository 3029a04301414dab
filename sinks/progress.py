"""One bar for all that takes longer than two seconds, on stderr, so that what a job prints can be piped."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import rich.progress
from rich.console import Console

from common.progress import draws_bars

T = TypeVar("T")


def track(work: Sequence[T], what: str) -> Iterator[T]:
    """Iterates over `work` behind a bar called `what`, without one where that is ""."""
    if not what:
        return iter(work)
    console = Console(stderr=True)
    hidden = not draws_bars(console)
    return iter(rich.progress.track(work, what, transient=True, console=console, disable=hidden))
