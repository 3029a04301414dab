"""A full disk: how to tell it from other failures, and the one line that a user gets."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
_WORDS = tuple(os.strerror(number) for number in FULL)


class NoSpaceError(OSError):
    """There was no space left to write to. The message says where, and what to do."""


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a used up quota, is what led to `error`.

    Libraries in C++ raise errors of other kinds, with the system's words in their text.
    """
    return any(
        (isinstance(e, OSError) and e.errno in FULL) or any(words in str(e) for words in _WORDS)
        for e in _chain(error, set())
    )


def told(error: BaseException) -> NoSpaceError | None:
    """The error that already says so, among those that led to `error`."""
    return next((e for e in _chain(error, set()) if isinstance(e, NoSpaceError)), None)


def no_space(error: BaseException, where: str | os.PathLike[str], so_far: str = "") -> NoSpaceError:
    """The line about `error`, which met a full disk; `so_far` says what of the run is safe.

    The disk is that of the folder `where`, unless the error itself names a file elsewhere.
    """
    named = (e.filename for e in _chain(error, set()) if isinstance(e, OSError) and e.errno in FULL)
    file = next((name for name in named if isinstance(name, str)), None)
    if file is not None and not Path(file).absolute().is_relative_to(Path(where).absolute()):
        where = file
    after = f"; {so_far}" if so_far else ""
    return NoSpaceError(
        f"no space left on {where}: free some and start the same command again{after}"
    )


def _chain(error: BaseException | None, seen: set[int]) -> Iterator[BaseException]:
    """An error, those in its group, and those that led to it."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield error
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for other in (*inner, error.__cause__, error.__context__):
        yield from _chain(other, seen)
