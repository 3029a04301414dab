"""What the chat needs of a terminal: messages typed or pasted, Ctrl-C, and text that cannot command the terminal."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

# Control characters become visible signs, but for newline and tab; "\r", which would overwrite a line, vanishes.
_SIGNS = {i: chr(0x2400 + i) for i in range(32)} | {0x7F: "␡"}
_SIGNS |= {i: f"\\x{i:02x}" for i in range(0x80, 0xA0)}
_SIGNS |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


def visible(text: str) -> str:
    """The text with control characters shown instead of obeyed: a model's answer must not move the cursor."""
    return text.translate(_SIGNS)


def say(text: str, *, end: str = "\n", error: bool = False) -> None:
    """Prints at once, control characters visible."""
    print(visible(text), end=end, flush=True, file=sys.stderr if error else sys.stdout)


def _obeys() -> bool:
    """Whether the output is a terminal that knows escape sequences."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def dim(text: str) -> str:
    """A line of facts: faint in a terminal, plain in a file."""
    return f"\x1b[2m{visible(text)}\x1b[0m" if _obeys() else visible(text)


def erase(text: str = "") -> None:
    """Writes `text` over the terminal's last line; nothing where the output is no terminal."""
    if _obeys():
        print(f"\r\x1b[K{visible(text)}", end="", flush=True)


def make_reader() -> Callable[[str], str]:
    """A function that asks for a message, and raises EOFError at the end and KeyboardInterrupt at Ctrl-C.

    In a terminal it edits lines: arrow keys, history of this session, and a paste of several lines as one message. From a
    pipe or a file it reads line by line.
    """
    if sys.stdin.isatty():
        return _line_editor()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]

    def read(prompt: str) -> str:
        with handling_interrupts(signal.default_int_handler):
            return input(prompt)

    return read


def _line_editor() -> Callable[[str], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event) -> None:
        event.current_buffer.insert_text("\n")

    # Where the answers go to a file, the prompt is written to the terminal all the same.
    output = None if sys.stdout.isatty() else create_output(always_prefer_tty=True)
    session = PromptSession(key_bindings=keys, output=output, enable_suspend=True)

    def read(prompt: str) -> str:
        # Halves of characters from a broken paste would fail in the tokenizer.
        return session.prompt(prompt).encode("utf-8", "replace").decode()

    return read


@contextlib.contextmanager
def handling_interrupts(handler) -> Iterator[None]:
    """SIGINT goes to `handler`; elsewhere than in the main thread, where Python allows none, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def ending_quietly(main: Callable[[], int]) -> int:
    """The exit code of a program that Ctrl-C, or a reader of its output that has gone, ends without a traceback."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # what is still in their buffers is written at exit
            os.dup2(nowhere, stream.fileno())
        return 128 + signal.SIGPIPE
