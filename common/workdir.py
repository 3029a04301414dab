"""The folder of a run: made, proved to be writable and seen by all processes, and held by that run alone."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from common.distributed import exchange
from common.full_disk import NoSpaceError, is_full, no_space, told
from common.lease import HeldError, Lease, read, token
from common.paths import check_local

HELD = ".held"  # the file that says who holds the folder; it goes when the run ends
SIGHT = 10.0  # seconds in which a file of one host must be seen by the others (they cache)


class WorkdirError(ValueError):
    """The folder cannot be the workdir of this run; the message says why, and the remedy."""


@contextlib.contextmanager
def hold(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes the folder, holds it for this run alone, and yields its path ("~" expanded).

    With several processes the first holds it, and all make sure that they see the same folder: call on
    every one. All get the same error. On the way out, folders that were made here and are still empty
    are removed. See common/lease.py for what becomes of a killed run's hold.

    Raises:
      WorkdirError: it cannot be made or written, another run holds it, or a process does not see it.
      NoSpaceError: anything inside failed because the disk is full.
    """
    if not os.fspath(path):
        raise WorkdirError("the workdir has no name: give one")
    folder, own, problem = _expanded(path), "", ""
    with contextlib.ExitStack() as cleanup:
        if jax.process_index() == 0:
            try:
                own = cleanup.enter_context(_held(folder))
            except WorkdirError as error:
                problem = str(error)
        problem, wanted = json.loads(exchange("workdir", json.dumps([problem, own]))[0])
        if problem:
            raise WorkdirError(problem)
        _check_all_see(folder, wanted)
        try:
            yield folder
        except Exception as error:
            if isinstance(error, NoSpaceError) or not is_full(error):
                raise
            raise told(error) or no_space(error, folder) from error


def _expanded(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no user of that name
        return Path(path)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[str]:
    """Makes and holds the folder; yields the token by which its file is known."""
    try:
        check_local(folder, "workdir")
    except ValueError as error:
        raise WorkdirError(str(error)) from error
    missing = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    lease = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lease = Lease(folder / HELD)
        except HeldError as error:
            text = f"workdir {folder}: {error}; wait for it, stop it, or name another folder"
            raise WorkdirError(text) from error
        except OSError as error:
            raise _unusable(folder, error) from error
        yield lease.me.token
    finally:
        if lease is not None:
            lease.release()
        for made in missing:
            with contextlib.suppress(OSError):  # it has become a run's
                made.rmdir()


def _unusable(folder: Path, error: OSError) -> WorkdirError:
    in_the_way = [p for p in (folder, *folder.parents) if os.path.lexists(p) and not p.is_dir()]
    reasons = {
        errno.EACCES: "there is no permission to write there",
        errno.EPERM: "there is no permission to write there",
        errno.EROFS: "its file system is read-only",
        errno.ENOSPC: "no space is left there",
        errno.EDQUOT: "the disk quota is used up",
    }
    if error.errno in (errno.EEXIST, errno.ENOTDIR) and in_the_way:
        why = f"{in_the_way[0]} is not a folder"
    else:
        why = reasons.get(error.errno or 0) or error.strerror or str(error)
    return WorkdirError(f"workdir {folder}: {why}; fix that, or name another folder")


def _check_all_see(folder: Path, wanted: str) -> None:
    """Raises WorkdirError on every process if one of them does not find the first one's file in its folder."""
    if jax.process_count() == 1:
        return
    until = time.monotonic() + SIGHT
    while not (seen := _sees(folder, wanted)) and time.monotonic() < until:
        time.sleep(0.2)
    name = f"process {jax.process_index()} ({socket.gethostname()}: {folder.absolute()})"
    found = [json.loads(text) for text in exchange("workdir seen", json.dumps([seen, name]))]
    if blind := [name for seen, name in found if not seen]:
        some = f"{', '.join(blind[:4])}{', ...' if len(blind) > 4 else ''}"
        raise WorkdirError(
            f"{some} {'does' if len(blind) == 1 else 'do'} not see the workdir of {found[0][1]}: name one folder that "
            "every host shares, as on NFS or in a mounted bucket"
        )


def _sees(folder: Path, wanted: str) -> bool:
    try:
        return token(read(folder / HELD)) == wanted
    except OSError:
        return False
