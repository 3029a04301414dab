"""Result rows: what a run measured and everything needed to measure it again.

A run ends in one `ResultRow`, appended as a line of JSON to `experiments/results/<paper>.jsonl`.
Tables are generated from rows, and a number in prose cites a row's `id`.
"""

import dataclasses
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from common.writers import NON_FINITE, complete_lines, to_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """One measured run. Holds no host name and no machine's path, so rows can be published.

    Attributes:
      id: unique and stable, `<config>-<8 hex digits of a hash over the rest>`.
      job: what was run, e.g. "jepa.pretrain".
      config, arg: the config file's name, and the argument given to it.
      overrides: what the command line changed in the config.
      config_hash: of the resolved config; see `config_hash`.
      commit: git commit, with "+dirty" where files differed from it; "unknown" outside a checkout.
      metrics: final numbers, in natural units; accuracy is a fraction.
      wall_seconds: of the whole run, resumed parts included.
      date: UTC, ISO 8601, to the second.
    """

    id: str
    job: str
    config: str
    arg: str
    overrides: dict[str, Any]
    config_hash: str
    commit: str
    versions: dict[str, str]
    hardware: str
    seeds: tuple[int, ...]
    steps: int
    metrics: dict[str, float]
    wall_seconds: float
    date: str


def make_row(
    *,
    job: str,
    config: str,
    metrics: Mapping[str, float],
    seeds: Sequence[int],
    steps: int,
    wall_seconds: float,
    arg: str = "",
    overrides: Mapping[str, Any] | None = None,
    resolved: Mapping[str, Any] | None = None,
) -> ResultRow:
    """A row of a run that just ended here: adds environment, date and id.

    Args:
      resolved: the whole config after overrides; only its hash is kept.
      overrides: absolute paths in it are cut to their last part.
    """
    row = ResultRow(
        id="",
        job=job,
        config=Path(config).stem,
        arg=arg,
        overrides=_without_paths(dict(overrides or {})),
        config_hash=config_hash(resolved or {}),
        **environment(),
        seeds=tuple(seeds),
        steps=steps,
        metrics={name: float(value) for name, value in metrics.items()},
        wall_seconds=round(wall_seconds, 3),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return dataclasses.replace(row, id=f"{row.config}-{config_hash(dataclasses.asdict(row))[:8]}")


def append_row(path: str | os.PathLike[str], row: ResultRow) -> None:
    """Appends under a lock, so that the jobs of a sweep may share a file, and syncs to disk.

    A line torn by a crash is cut off first. Raises ValueError if a row with this id is there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes
        if any(old.id == row.id for old in read_rows(path)):
            raise ValueError(f"{path} already has a row {row.id!r}: was the same run added twice?")
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write((to_json(dataclasses.asdict(row)) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: str | os.PathLike[str]) -> list[ResultRow]:
    """All rows, none if there is no file. Raises ValueError at a line that is not a row."""
    if not Path(path).exists():
        return []
    fields = {f.name for f in dataclasses.fields(ResultRow)}
    rows = []
    for number, line in enumerate(complete_lines(path), start=1):
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None
        if odd := fields ^ data.keys():
            raise ValueError(f"{path}:{number} has unknown or lacks fields: {sorted(odd)}")
        data["seeds"] = tuple(data["seeds"])
        data["metrics"] = {name: NON_FINITE.get(v, v) for name, v in data["metrics"].items()}
        rows.append(ResultRow(**data))
    return rows


def environment() -> dict[str, Any]:
    """The fields `commit`, `versions` and `hardware` of a row, for this process."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"commit": _commit(), "versions": versions, "hardware": _hardware()}


def config_hash(config: Mapping[str, Any]) -> str:
    """12 hex digits that do not depend on the order of keys, on tuple or list."""
    text = json.dumps(json.loads(to_json(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Summary:
    """A metric over the seeds of one setting; `sd` is the sample's (n - 1), NaN for n = 1."""

    mean: float
    sd: float
    n: int

    def __str__(self) -> str:
        return (
            f"{self.mean:.4g}" if self.n == 1 else f"{self.mean:.4g} ± {self.sd:.2g} (n={self.n})"
        )


def summarize(
    rows: Iterable[ResultRow], *, by: str | Callable[[ResultRow], Any], metric: str
) -> dict[Any, Summary]:
    """Mean and spread of a metric in each group, in order of first appearance.

    `by` is a field's name, or a function of a row such as `lambda r: r.overrides["mask"]`. Rows
    without the metric are left out; a NaN among the values makes mean and spread NaN.
    """
    key = by if callable(by) else lambda row: getattr(row, by)
    groups: dict[Any, list[float]] = {}
    for row in rows:
        if metric in row.metrics:
            groups.setdefault(key(row), []).append(row.metrics[metric])

    def summary(values: list[float]) -> Summary:
        has_spread = len(values) > 1 and all(map(math.isfinite, values))
        sd = statistics.stdev(values) if has_spread else math.nan
        return Summary(statistics.fmean(values), sd, len(values))

    return {group: summary(values) for group, values in groups.items()}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, columns of numbers to the right. None is an empty cell."""
    rows = [["" if cell is None else cell for cell in row] for row in rows]
    if odd := [row for row in rows if len(row) != len(header)]:
        raise ValueError(f"every row needs {len(header)} cells like {list(header)}, got {odd[0]}")

    def line(cells: Sequence[Any]) -> str:
        text = [f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells]
        return "| " + " | ".join(t.replace("|", "\\|") for t in text) + " |\n"

    columns = [[cell for cell in column if cell != ""] for column in zip(*rows)]
    numeric = [all(isinstance(c, (int, float, Summary)) for c in column) for column in columns]
    rule = ["---:" if right else "---" for right in numeric] or ["---"] * len(header)
    return line(header) + line(rule) + "".join(map(line, rows))


def _without_paths(value: Any) -> Any:
    if isinstance(value, str):  # "/a/b/c" -> "c", but "S/16" and "gs://bucket/c" stay
        return re.sub(r"(?<![\w.:/])~?/(?:[^\s/,;'\"]+/)*", "", value)
    if isinstance(value, Mapping):
        return {k: _without_paths(v) for k, v in value.items()}
    return [_without_paths(v) for v in value] if isinstance(value, (list, tuple)) else value


def _commit() -> str:
    here = Path(__file__)

    def git(*args: str) -> str:
        command = ["git", "-C", str(here.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not somebody else's checkout around us
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "unknown"


def _hardware() -> str:
    """E.g. "Intel(R) Xeon(R) Processor, 2 cores; 8x TPU v4"."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = match.group(1) if match else model
    text = f"{model}, {os.cpu_count()} cores"
    kinds = [d.device_kind for d in jax.devices() if d.platform != "cpu"]
    return "; ".join([text, *(f"{kinds.count(k)}x {k}" for k in dict.fromkeys(kinds))])
