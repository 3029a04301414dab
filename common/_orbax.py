"""What keeps orbax and tensorstore quiet; common/checkpoint.py says in one line what they have to say."""

import contextlib
import logging
import sys
import warnings


def _is_for_users(record: logging.LogRecord) -> bool:
    """Orbax tells of every barrier and thread at INFO, and of a failure, which it raises too, in each thread's traceback."""
    return "orbax" not in record.pathname or (
        record.levelno >= logging.WARNING and not record.exc_info
    )


logging.getLogger("absl").addFilter(_is_for_users)

_hook = sys.unraisablehook


def _unless_orbax_gave_up(unraisable: "sys.UnraisableHookArgs") -> None:
    """The writes of a save that failed end in tensorstore's threads, which find their event loop closed."""
    if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
        _hook(unraisable)


sys.unraisablehook = _unless_orbax_gave_up


@contextlib.contextmanager
def muted():
    """A failed load leaves coroutines and tasks that complain on stderr; the caller says why."""
    asyncio_log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    asyncio_log.disabled, sys.unraisablehook = True, lambda _: None
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        asyncio_log.disabled, sys.unraisablehook = False, hook
