"""How a command ends after Ctrl-C."""

import os
import sys

EXIT_INTERRUPTED = 130  # by Ctrl-C, as shells have it


def interrupted() -> int:
    """Says so in one line; the exit code."""
    print("stopped; start the same command again to continue", file=sys.stderr)
    return EXIT_INTERRUPTED


def leave(code: int) -> None:
    """Ends the process. After Ctrl-C at once: jax may still compute, and the interpreter's own end can crash on that."""
    if code == EXIT_INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
