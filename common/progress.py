"""Where a progress bar can be drawn."""

import rich
from rich.console import Console


def draws_bars(console: Console | None = None) -> bool:
    """Whether a bar can move on `console` (default: stdout): in a terminal or a notebook.

    Elsewhere rich draws none, but ends each with an empty line: give it `disable=not draws_bars()`.
    """
    shown: Console = rich.get_console() if console is None else console
    return shown.is_interactive or shown.is_jupyter
