"""Looking at a run from inside: a trace of a few steps, and memory."""

import os
from pathlib import Path
from typing import Any

import jax


class ProfileWindow:
    """A hook that traces the steps `start <= step < stop` into `<workdir>/profile`.

    View the trace with `xprof` or TensorBoard's profile plugin. Pick a window after compilation.
    Call the hook before each step; a run that resumes inside the window traces what is left of it,
    one that resumes after it traces nothing. `close` ends a trace that a run left open, and is safe
    to call twice.
    """

    def __init__(self, workdir: str | os.PathLike[str], start: int, stop: int) -> None:
        if not 0 <= start < stop:
            raise ValueError(f"profile window needs 0 <= start < stop, got {start=} and {stop=}")
        self.directory = Path(workdir) / "profile"
        self.start, self.stop = start, stop
        self._tracing = False

    def __call__(self, step: int, outputs: Any = None) -> None:
        """`outputs` of the last step are waited for before the trace ends: dispatch runs ahead."""
        inside = self.start <= step < self.stop
        if inside and not self._tracing:
            jax.profiler.start_trace(self.directory)
            self._tracing = True
        elif not inside and self._tracing:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


def annotate(step: int) -> jax.profiler.StepTraceAnnotation:
    """A context manager around one step, by which the profiler's viewers group their events."""
    return jax.profiler.StepTraceAnnotation("train", step_num=step)


def device_memory() -> dict[str, int]:
    """Bytes on the fullest local device: `in_use`, `peak`, `limit`. Empty on CPU."""
    stats = [s for d in jax.local_devices() if (s := d.memory_stats())]
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {
        name: max(s[key] for s in stats)
        for name, key in names.items()
        if stats and all(key in s for s in stats)
    }
