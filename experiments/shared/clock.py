"""Wall seconds that outlast a killed process."""

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import jax

from common.writers import write_whole

log = logging.getLogger("triptych")
HEARTBEAT = 10.0  # seconds between two writes: what a kill can lose


class Clock:
    """Wall seconds of a piece of work over all its starts, also those that were killed.

    A thread writes the sum into a file every HEARTBEAT seconds, on process 0; so no more than that is lost.
    """

    def __init__(self, path: Path, name: str) -> None:
        """`name`: of the work, as several may share the file."""
        self.path, self.name = path, name
        self._began, self._before = time.perf_counter(), self._read().get(name, 0.0)
        self._stop, self._thread = threading.Event(), None

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._began

    def __enter__(self) -> "Clock":
        if jax.process_index() == 0 and self._thread is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._stop, self._thread = threading.Event(), None
            self._write()

    def reset(self) -> None:
        """Forgets earlier starts, whose work is not part of this one."""
        self._before = 0.0

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            self._write()

    def _read(self) -> dict[str, float]:
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}

    def _write(self) -> None:
        try:
            write_json(self.path, self._read() | {self.name: round(self.seconds, 3)})
        except OSError as error:  # a full disk ends the run elsewhere, and with better words
            log.debug("%s: %s", self.path, error)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, as `write_whole`."""
    write_whole(path, json.dumps(value, indent=2) + "\n")
