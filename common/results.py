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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from common.commit import find_commit
from common.writers import NON_FINITE, complete_lines, to_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """One measured run. Holds no host name and no machine's path, so rows can be published.

    Attributes:
      id: unique and stable, `<config>-<8 hex digits of a hash over the rest>`.
      job: what was run, e.g. "jepa.pretrain".
      config, arg: the config file's name, and the argument given to it.
      overrides: what the command line changed in the config; in a sweep also which part this is ("method", "row").
      config_hash: of the resolved config, without the settings that may differ between the starts of a run.
      commit: see `find_commit`.
      metrics: final numbers, in natural units; accuracy is a fraction.
      wall_seconds: of the whole run, resumed parts included.
      date: UTC, ISO 8601, to the second.
      changes: what was changed on the way: `{"step": 20, "config.optim.lr": [old, new]}`. "commit" may be among them.
      processes, devices, mesh: that the last start ran on; 0 and {} where it was not recorded.
      dtype: of the computation, where there is one.
      seconds: what the wall seconds went to (compile, input, step, eval, save), where it was recorded.
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
    changes: tuple[dict[str, Any], ...] = ()
    processes: int = 0
    devices: int = 0
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    dtype: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ResultRow":
        """Rows of older versions lack the fields that have a default. Raises ValueError naming odd fields."""
        if not isinstance(data, Mapping):
            raise ValueError(f"is no row: {str(data)[:40]!r}")
        fields = dataclasses.fields(cls)
        known = {f.name for f in fields}
        needed = {f.name for f in fields if _no_default(f)}
        if odd := sorted((data.keys() - known) | (needed - data.keys())):
            raise ValueError(f"has unknown or lacks fields: {odd}")
        values = {**data, "seeds": tuple(data["seeds"]), "changes": tuple(data.get("changes", ()))}
        values["metrics"] = {name: NON_FINITE.get(v, v) for name, v in data["metrics"].items()}
        return cls(**values)


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
    hashed: str = "",
    commit: str = "",
    changes: Sequence[Mapping[str, Any]] = (),
    mesh: Mapping[str, int] | None = None,
    dtype: str = "",
    seconds: Mapping[str, float] | None = None,
) -> ResultRow:
    """A row of a run that just ended here: adds environment, date and id.

    Args:
      resolved: the whole config after overrides; only its hash is kept.  hashed: that hash itself.
      arg, overrides, changes: absolute paths in them are cut to their last part.
      commit: that the run began with; "" finds the one of now.
    """
    row = ResultRow(
        id="",
        job=job,
        config=Path(config).stem,
        arg=_without_paths(arg),
        overrides=_without_paths(dict(overrides or {})),
        config_hash=hashed or config_hash(resolved or {}),
        **{**environment(), **({"commit": commit} if commit else {})},
        seeds=tuple(seeds),
        steps=steps,
        metrics={name: float(value) for name, value in metrics.items()},
        wall_seconds=round(wall_seconds, 3),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        changes=tuple(_without_paths(dict(change)) for change in changes),
        processes=jax.process_count(),
        devices=1 if mesh is None else math.prod(mesh.values()),
        mesh=dict(mesh or {}),
        dtype=dtype,
        seconds={name: round(value, 3) for name, value in (seconds or {}).items()},
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
    rows = []
    for number, line in enumerate(complete_lines(path), start=1):
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None
        try:
            rows.append(ResultRow.from_json(data))
        except ValueError as error:
            raise ValueError(f"{path}:{number} {error}") from None
    return rows


def environment() -> dict[str, Any]:
    """The fields `commit`, `versions` and `hardware` of a row, for this process."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"commit": find_commit(), "versions": versions, "hardware": _hardware()}


def config_hash(config: Mapping[str, Any]) -> str:
    """12 hex digits that do not depend on the order of keys, on tuple or list."""
    text = json.dumps(json.loads(to_json(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, columns of numbers to the right. None is an empty cell."""
    rows = [["" if cell is None else cell for cell in row] for row in rows]
    if odd := [row for row in rows if len(row) != len(header)]:
        raise ValueError(f"every row needs {len(header)} cells like {list(header)}, got {odd[0]}")

    def line(cells: Sequence[Any]) -> str:
        text = [f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells]
        return "| " + " | ".join(t.replace("|", "\\|") for t in text) + " |\n"

    columns = [[cell for cell in column if cell != ""] for column in zip(*rows)]
    numeric = [all(isinstance(c, (int, float)) for c in column) for column in columns]
    rule = ["---:" if right else "---" for right in numeric] or ["---"] * len(header)
    return line(header) + line(rule) + "".join(map(line, rows))


def _no_default(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _without_paths(value: Any) -> Any:
    if isinstance(
        value, str
    ):  # "/a/b/c" and "folder:/a/b/c" -> "c", but "S/16" and "gs://bucket/c" stay
        return re.sub(r"(?<![\w./])~?/(?!/)(?:[^\s/,;'\"]+/)*(?=[^\s/,;'\"])", "", value)
    if isinstance(value, Mapping):
        return {k: _without_paths(v) for k, v in value.items()}
    return [_without_paths(v) for v in value] if isinstance(value, (list, tuple)) else value


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
