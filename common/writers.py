"""Where the numbers of a run go: always a file, and if asked the terminal, TensorBoard, W&B.

`metrics.jsonl` is the record: one JSON object a line, `{"step": 9, "wall": 1.7e9, "loss": 2.3}`,
with `wall` the Unix time in seconds. It survives SIGKILL (a torn last line is dropped) and resuming
(rows after the restored step are dropped, so that the curve equals an uninterrupted run's).
"""

import collections
import contextlib
import importlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from common.config import ConfigError

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Writer(Protocol):
    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records host floats for a step. Steps never decrease."""
        ...

    def close(self) -> None:
        """Flushes. Safe to call twice."""
        ...


def to_json(row: Mapping[str, Any]) -> str:
    """One line of strict JSON, in which the floats JSON lacks are "nan", "inf" and "-inf"."""

    def encode(x: Any) -> Any:
        if isinstance(x, float) and not math.isfinite(x):
            return str(x)
        if isinstance(x, Mapping):
            return {k: encode(v) for k, v in x.items()}
        return [encode(v) for v in x] if isinstance(x, (list, tuple)) else x

    return json.dumps(encode(row), allow_nan=False, separators=(", ", ": "))


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file as a whole or, where it cannot (a full disk, a kill), leaves the one before."""
    new = Path(f"{os.fspath(path)}.new")
    try:
        with open(new, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        new.unlink(missing_ok=True)
        raise
    os.replace(new, path)


def complete_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a file that ends in a newline: what a killed writer left after it is dropped."""
    text = Path(path).read_bytes()
    return text[: text.rfind(b"\n") + 1].decode().splitlines()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`, in order. Raises ValueError naming a line that is no JSON."""
    rows = []
    for number, line in enumerate(complete_lines(path), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not a JSON row ({error}): {line!r}") from None
        rows.append({k: NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()})
    return rows


class JsonlWriter:
    """Appends a line per write, flushed at once, to a local file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if "://" in str(path):
            raise ValueError(f"metrics need a local path to append to, got {str(path)!r}")
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO | None = None

    def resume_from(self, step: int) -> None:
        """Keeps the rows up to and including `step` (-1: none), atomically. Call before writing."""
        if not self.path.exists():
            return
        rows = [line for line in complete_lines(self.path) if json.loads(line)["step"] <= step]
        self._replace(rows)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._file is None:
            self._file = self._open()
        row = {"step": int(step), "wall": round(time.time(), 3), **scalars}
        self._file.write(to_json(row) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._replace(complete_lines(self.path))
        return open(self.path, "a", buffering=1)

    def _replace(self, lines: Sequence[str]) -> None:
        write_whole(self.path, "".join(line + "\n" for line in lines))


class ConsoleWriter:
    """A progress bar on a terminal; plain lines, at most one in `every` seconds, in a log.

    Rows that hold `headline` are training steps and move the bar; others, such as evaluations, are
    always printed in full. The rate is over the last 20 training rows, so that it leaves out
    compilation. `items_per_step` (the global batch) turns steps/s into `unit`/s.
    """

    def __init__(
        self,
        total_steps: int,
        items_per_step: float = 1,
        unit: str = "steps",
        headline: str = "loss",
        every: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self.items, self.unit = total_steps, items_per_step, unit
        self.headline, self.every = headline, every
        self.stream = stream or sys.stdout
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=20)
        self._printed_at = -math.inf
        self._bar: Progress | None = None
        if self.stream.isatty() and os.environ.get("TERM") != "dumb":
            numbers = TextColumn("{task.completed}/{task.total}  {task.fields[status]}")
            console = Console(file=self.stream)
            bar = Progress(BarColumn(), TaskProgressColumn(), numbers, console=console)
            self._task = bar.add_task("", total=total_steps, status="")
            self._bar = bar  # shown from the first row on: what is logged before it would tear it

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self.headline not in scalars:
            values = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
            self._line(f"step {step}  {values}")
            return
        now = time.monotonic()
        self._recent.append((now, step))
        status = self._status(step, scalars[self.headline])
        if self._bar is not None:
            self._bar.start()
            self._bar.update(self._task, completed=step, status=status)
        elif now - self._printed_at >= self.every or step >= self.total:
            self._printed_at = now
            self._line(f"step {step}/{self.total}  {step / self.total:.0%}  {status}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _status(self, step: int, headline: float) -> str:
        text = f"{self.headline} {headline:.4g}"
        (then, first), (now, last) = self._recent[0], self._recent[-1]
        if last > first and now > then:
            steps_per_second = (last - first) / (now - then)
            left = _duration((self.total - step) / steps_per_second)
            rate = steps_per_second * self.items
            text += f"  {rate:{',.0f' if rate >= 100 else '.3g'}} {self.unit}/s  {left} left"
        return text

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)


def _duration(seconds: float) -> str:
    """75 -> "1m15s", 7300 -> "2h01m"."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02}s" if s < 3600 else f"{s // 3600}h{s // 60 % 60:02}m"


class TensorBoardWriter:
    """Scalars for TensorBoard, through tensorboardX (no TensorFlow).

    Args:
      purge_step: the first step of this process; TensorBoard then hides what an earlier one wrote from there on.
    """

    def __init__(self, logdir: str | os.PathLike[str], purge_step: int = 0) -> None:
        module = _optional("tensorboardX", extra="tensorboard")
        # The suffix tells two files of the same second apart.
        self._writer = module.SummaryWriter(
            str(logdir), purge_step=purge_step, filename_suffix=f".from{purge_step}"
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Scalars for Weights & Biases. The same `run_id` continues the same run; further arguments go to `wandb.init`.

    Raises:
      ConfigError: W&B refuses, most often because nobody is logged in.
    """

    def __init__(
        self, project: str, run_id: str, config: Mapping[str, Any] | None = None, **init: Any
    ) -> None:
        wandb = _optional("wandb", extra="wandb")
        settings = {"project": project, "id": run_id, "config": dict(config or {}), **init}
        try:  # a run may go on, and with another setting
            self._run = wandb.init(**settings, resume="allow", allow_val_change=True)
        except wandb.Error as error:
            raise ConfigError(
                f"W&B cannot be used: {error} Without an account set WANDB_MODE=offline, or leave it out"
            ) from error
        # W&B refuses to log an earlier step again, which a resumed run must: step is a value here.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()


def wandb_id(workdir: str | os.PathLike[str]) -> str:
    """The id of a work dir's run on W&B: made once, and kept in `<workdir>/wandb_id`, so that a resumed run goes on.

    Not the folder's name: a/cifar10 and b/cifar10 would be one run.
    """
    path = Path(workdir) / "wandb_id"
    if not path.exists() or not path.read_text().strip():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        new.write_text(secrets.token_hex(8) + "\n")
        os.replace(new, path)
    return path.read_text().strip()


def _optional(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this writer needs {module}: pip install 'triptych[{extra}]', or leave it out"
        ) from error


class MultiWriter:
    """Writes to each of several writers in turn; to none, it is the writer of processes > 0."""

    def __init__(self, *writers: Writer) -> None:
        self.writers = writers

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self.writers:
            writer.write(step, scalars)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # closes every one, even if one of them raises
            for writer in reversed(self.writers):
                stack.callback(writer.close)


def make_writer(
    workdir: str | os.PathLike[str],
    total_steps: int,
    *,
    restored_step: int = -1,
    items_per_step: float = 1,
    unit: str = "steps",
    headline: str = "loss",
    tensorboard: bool = False,
    wandb: Mapping[str, Any] | None = None,
) -> MultiWriter:
    """The writers of a run. Only process 0 writes; elsewhere nothing is opened.

    Args:
      restored_step: of the restored checkpoint, whose later rows are dropped; -1 for a fresh
        start, which drops every row.
      tensorboard: whether to write event files, into `<workdir>/tensorboard`.
      wandb: keyword arguments of `WandbWriter`, at least `project`; the id is the work dir's (`wandb_id`), and so is the
        name shown. None for no W&B.
    """
    if jax.process_index() != 0:
        return MultiWriter()
    jsonl = JsonlWriter(Path(workdir) / "metrics.jsonl")
    jsonl.resume_from(restored_step)
    writers: list[Writer] = [jsonl]
    if tensorboard:
        writers.append(TensorBoardWriter(Path(workdir) / "tensorboard", restored_step + 1))
    if wandb is not None:
        own = {
            "run_id": wandb_id(workdir),
            "name": Path(workdir).resolve().name,
            "dir": str(workdir),
        }
        writers.append(WandbWriter(**{**own, **wandb}))
    writers.append(ConsoleWriter(total_steps, items_per_step, unit, headline))
    return MultiWriter(*writers)
