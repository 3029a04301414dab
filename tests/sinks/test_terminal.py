"""The chat in a terminal: long lines, pastes, arrow keys, Ctrl-C, leaving; and text that must not command it."""

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from common.checkpoint import read_meta
from sinks import terminal
from tests.sinks.checkpoints import byte_level_folder

START = (  # the child takes the terminal as its own, so that Ctrl-C reaches it
    "import os, runpy, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); "
    "runpy.run_module('sinks.chat', run_name='__main__', alter_sys=True)"
)
READY = r"\?2004h"  # the line editor asks for pastes to be marked
PASTE, PASTED, LEFT, UP, CTRL_C = "\x1b[200~", "\x1b[201~", "\x1b[D", "\x1b[A", "\x03"


class Terminal:
    """A pseudo-terminal with the chat in it."""

    def __init__(self, *flags, **env):
        self.ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        env = os.environ | {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"} | env
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *flags], stdin=theirs, stdout=theirs, stderr=theirs,
            env=env, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def wait_for(self, pattern, seconds=120):
        """Everything shown until `pattern` is."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self.ours], [], [], max(0, end - time.monotonic()))
            assert ready, (
                f"{pattern!r} was not shown within {seconds} s, but {self.shown[-2000:]!r}"
            )
            try:
                self.shown += os.read(self.ours, 1 << 16).decode(errors="replace")
            except OSError:  # the program is gone
                assert re.search(pattern, self.shown), self.shown[-2000:]
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def write(self, text):
        data = text.encode()
        while data:  # as fast as the terminal takes it
            _, ready, _ = select.select([], [self.ours], [], 60)
            assert ready, "the program reads nothing"
            data = data[os.write(self.ours, data[:512]) :]
            if select.select([self.ours], [], [], 0)[0]:
                self.shown += os.read(self.ours, 1 << 16).decode(errors="replace")

    def says(self, text):
        """Sends a message; returns what is shown up to the facts after its answer."""
        self.write(text + "\r")
        return self.wait_for(rf"forgotten\][\s\S]*{READY}")


@pytest.mark.slow
def test_a_conversation_in_a_real_terminal(tmp_path):
    model = byte_level_folder(tmp_path / "model")
    chat = Terminal(
        f"--model={model}", "--recent=60", "--limit=2", TRIPTYCH_CACHE=str(tmp_path / "cache")
    )
    try:
        chat.wait_for(READY)
        line = "".join(f"{i:04}." for i in range(1600)) + "end"  # 8,003 characters, typed
        chat.says(line)
        chat.says(f"{PASTE}one\ntwo\nthree{PASTED}")
        chat.says(f"ab{LEFT}c")
        chat.says(UP + UP)
        chat.write(CTRL_C)
        chat.wait_for(f"Ctrl-C again, /quit or Ctrl-D leaves[\\s\\S]*{READY}")
        chat.write(f"{PASTE}{'x' * 100_000}{PASTED}")
        time.sleep(0.5)
        chat.write("\r")
        chat.wait_for(r"reading: [\d,]+ of 100,0\d\d tokens")
        chat.write(CTRL_C)
        shown = chat.wait_for(READY)
        assert re.search(r"holds the first [\d,]+ of 100,0\d\d tokens of this message", shown)
        chat.write(f"/save {model}/config.json/x\r")
        chat.wait_for(rf"error: .* cannot be written[\s\S]*{READY}")
        chat.write("/quit\r")
        chat.wait_for(rf"{READY}[\s\S]*are not saved")
        chat.write(f"{tmp_path}/talk\r")
        chat.wait_for("saved in")
        assert chat.process.wait(30) == 0
    finally:
        chat.process.kill()
        chat.process.wait()
        os.close(chat.ours)
    dialog = read_meta(tmp_path / "talk")["dialog"]
    said = [m["content"] for m in dialog["messages"] if m["role"] == "user"]
    assert said == [line, "one\ntwo\nthree", "acb", "one\ntwo\nthree"]
    assert 0 < len(dialog["draft"]) < 100_000 and set(dialog["draft"]) == {"x"}


def test_control_characters_are_shown_not_obeyed(capsys):
    assert terminal.visible("a\tb\nc\r\x1b[2J\x07\x00\x7f\x9b é😀") == "a\tb\nc␛[2J␇␀␡\\x9b é😀"
    terminal.say("\x1b]0;title\x07")
    terminal.say("\x1b[31m", error=True)
    out, err = capsys.readouterr()
    assert (out, err) == ("␛]0;title␇\n", "␛[31m\n")
    assert terminal.dim("\x1b") == "␛"  # not a terminal: no colours either


def test_an_interrupt_goes_to_the_handler_and_afterwards_where_it_went_before():
    seen, before = [], signal.getsignal(signal.SIGINT)
    with terminal.handling_interrupts(lambda *_: seen.append(1)):
        signal.raise_signal(signal.SIGINT)
    assert seen == [1] and signal.getsignal(signal.SIGINT) is before
    thread = threading.Thread(target=lambda: terminal.handling_interrupts(None).__enter__())
    thread.start()  # where Python allows no handlers
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_a_program_whose_user_or_reader_has_gone_ends_without_a_traceback(error, code):
    program = (
        "import sys; from sinks.terminal import ending_quietly\n"
        f"def main():\n    sys.stdout.write('x' * 99)\n    raise {error.__name__}\n"
        "sys.exit(ending_quietly(main))"
    )
    reader, writer = os.pipe()
    if error is BrokenPipeError:
        os.close(reader)
    child = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (child.returncode, child.stderr) == (code, b"")


def test_ctrl_c_while_the_libraries_load_ends_without_a_traceback():
    begun = (
        "import runpy, sys; print(flush=True); runpy.run_module('sinks.chat', run_name='__main__')"
    )
    chat = subprocess.Popen(
        [sys.executable, "-c", begun], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip
    assert chat.stdout.read(1)
    time.sleep(0.3)
    chat.send_signal(signal.SIGINT)
    _, said = chat.communicate(timeout=60)
    assert (chat.returncode, said) == (130, b"")
