"""A run: one job's settings and its workdir, with the record of every start in it, the clock, and the row at the end.

A workdir belongs to one config. `config.json` holds it, and a start with other settings is refused before anything is
computed or written, with every difference named. What is in FREE may differ: it changes no result. `--resume=changed` takes
the other settings on purpose; `run.json` keeps what changed at which step, and the row has it too. Settings that decide what
a saved state means (the stream of data, shapes, what the finished parts of a sweep measured) cannot change so. A workdir of
an older version is gone on with: what it had no setting for, and that its commit is not known, is told as a change.

Files of a workdir that every job has: config.json, run.json, clock.json, and result.json and results.jsonl at the end.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from common.checkpoint import DamagedError, StructureError, read_meta
from common.commit import find_commit
from common.config import ConfigError
from common.distributed import EXIT_PREEMPTED
from common.evaluation import EvaluationFailed
from common.results import ResultRow, append_row, config_hash, make_row, read_rows
from common.train_loop import NonFiniteLoss, Preempted
from common.writers import to_json
from experiments.shared.clock import Clock, write_json
from experiments.shared.old_settings import ADDED, as_before, renewed

log = logging.getLogger("triptych")

# What may differ between the starts of a run: where and how it is computed and recorded, not what. A name
# stands for its whole group.
FREE = (
    "job",  # a run and its baselines share a workdir; each row names its own job
    "mesh",
    "train.accumulate",
    "train.steps_per_dispatch",
    "data.workers",
    "data.skip_bad",  # batches are the same up to the first damaged image, and the row counts what was skipped
    "data.data_dir",
    "task.data_dir",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "grid.save_every",
    "save_every",
    "train.profile_start",
    "train.profile_steps",
    "checkpoint.keep",
    "writers",
)
RESUME = ("same", "changed")
NOTHING = object()  # a setting that one of two configs lacks


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting by its full name, such as "config.optim.lr", as JSON would give it back."""

    def walk(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {name: value}
        return {
            k: v for key, inner in value.items() for k, v in walk(f"{name}.{key}", inner).items()
        }

    plain = json.loads(to_json(values))
    return {k: v for key, value in plain.items() for k, v in walk(f"config.{key}", value).items()}


def within(name: str, groups: Sequence[str]) -> bool:
    """Whether a setting's full name is one of `groups`, or inside one."""
    return any(name == f"config.{g}" or name.startswith(f"config.{g}.") for g in groups)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ and are not free to: full name -> (saved, now), NOTHING where one has none."""
    old, new = (settings_of(renewed(config)) for config in (saved, now))
    added = {f"config.{k}": v for k, v in ADDED.get(now.get("job", ""), {}).items()}
    old, new = added | old, added | new
    pairs = {name: (old.get(name, NOTHING), new.get(name, NOTHING)) for name in {**old, **new}}
    return {k: (a, b) for k, (a, b) in pairs.items() if a != b and not within(k, FREE)}


def hash_of(values: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """The hash that rows carry: of every setting that is not free, nor in `without`."""
    left_out = (*FREE, *without)
    values = settings_of(as_before(values))
    return config_hash({k: v for k, v in values.items() if not within(k, left_out)})


@dataclass
class Run:
    """One start of a job.

    Attributes:
      values: the resolved config.  workdir: where everything goes.
      config: the config file's path or name; "" takes config.name.  arg: its argument, the text after ":".
      overrides: what the command line changed, by setting (`optim.lr`).
      resume: "same" refuses a workdir with other settings; "changed" takes the new ones.
      has_flag: whether whoever starts this run offers --resume.
    """

    values: dict[str, Any]
    workdir: Path
    config: str = ""
    arg: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    resume: str = "same"
    has_flag: bool = True

    def __post_init__(self) -> None:
        if self.resume not in RESUME:
            raise ConfigError(f"--resume={self.resume}: one of {', '.join(RESUME)}")
        self.workdir = Path(self.workdir)
        self.job = self.values.get("job", "")
        self.saved = self._saved_config()
        changed = {} if self.saved is None else differences(self.saved, self.values)
        # What the version that made this workdir did not know, unless the command line sets it.
        set_now = {f"config.{name}" for name in self.overrides}
        self.added = {k: b for k, (a, b) in changed.items() if a is NOTHING and k not in set_now}
        self.changed = {k: pair for k, pair in changed.items() if k not in self.added}
        self.clock = Clock(self.workdir / "clock.json", self.job)
        self.commit = find_commit()  # now: a long run's files may be edited while it lasts
        self._changes: list[dict[str, Any]] = []
        self._choosing: Sequence[str] = ()

    @property
    def part_hash(self) -> str:
        """The hash of what a part of this sweep is measured with: all but the settings that only choose the parts."""
        return hash_of(self.values, (*self._choosing, "name"))

    # Before anything is computed

    def check(self, only: Sequence[str] | None = None) -> None:
        """Applies the rule of this page.

        Args:
          only: of a sweep, the settings (and groups) that choose its parts: no other may change, even on purpose. None:
            every setting may.

        Raises:
          ConfigError: the workdir's settings are others, each of them named.
        """
        self._choosing = only or ()
        if self.saved is None:
            return self._check_rows()
        if self.added:
            new = ", ".join(f"{name}={value!r}" for name, value in self.added.items())
            log.warning("%s is of an older version; new settings: %s", self.workdir, new)
        fixed = [k for k in self.changed if only is not None and not within(k, (*only, "name"))]
        if not self.changed or (self.resume == "changed" and not fixed):
            return None
        lines = [f"  {k}: saved {_show(a)}, now {_show(b)}" for k, (a, b) in self.changed.items()]
        remedy = "Take another --workdir, or restore the saved settings"
        if fixed:
            remedy += f": what is measured here belongs to one {', '.join(fixed)}, so that cannot change on purpose either"
        elif self.has_flag:
            remedy = (
                "Take another --workdir, or go on with the new settings on purpose: --resume=changed (what decides the "
                "stream of training data, or the shapes of the state, cannot change)"
            )
        raise ConfigError(
            "\n".join([f"{self.workdir} holds a run with other settings:", *lines, remedy])
        )

    def done(self) -> bool:
        """Whether result.json is the result of this job with these settings; says so, and adds a lost row."""
        path = self.workdir / "result.json"
        if self.saved is None or self.changed or not path.exists():
            return False
        try:
            row = ResultRow.from_json(json.loads(path.read_text()))
        except ValueError as error:
            raise ConfigError(f"{path} is no result ({error}): remove it") from error
        if row.job != self.job or not self.owns(row):
            return False
        rows = self.workdir / "results.jsonl"
        if jax.process_index() == 0 and row.id not in {r.id for r in read_rows(rows)}:
            append_row(rows, row)  # killed between the two
        log.info("done before: the result lies in %s", path)
        return True

    def owns(self, row: ResultRow, *, part: bool = False, **former: Any) -> bool:
        """Whether a row (of a part) is of these settings.

        `former`: what older versions put into the config whose hash they wrote; NOTHING, where they had no such setting.
        """
        config = {**as_before(self.saved or self.values), "job": self.job, **former}
        config = {k: v for k, v in config.items() if v is not NOTHING}
        without = (*self._choosing, "name") if part else ()
        ours = hash_of(self.values, without), hash_of(config, without)
        return row.config_hash in (*ours, config_hash(config))

    def rows(
        self, part: Mapping[str, Any], folder: Path | None = None, **former: Any
    ) -> list[ResultRow]:
        """The rows of a part of this sweep that is done, in results.jsonl of `folder` (the workdir).

        Args:
          part: what tells this one from the others, as `row` was given it.  former: see `owns`.

        Raises:
          ConfigError: they are of other settings.
        """
        rows = read_rows(path := (folder or self.workdir) / "results.jsonl")
        rows = [row for row in rows if part.items() <= row.overrides.items()]
        if not all(self.owns(row, part=True, **former) for row in rows):
            name = ", ".join(map(str, part.values())) or "a part"
            raise ConfigError(
                f"{path} has rows of {name} from another config: take another --workdir"
            )
        return rows

    # While it lasts

    def begin(self, restored: int | None = None) -> None:
        """Makes the workdir, writes config.json, and starts the clock. Call when nothing can be refused any more.

        Args:
          restored: the step of the restored state; 0 for finished parts, None if everything starts from the beginning.
        """
        records = _read_json(path := self.workdir / "run.json") or {}
        record = records.get(self.job, {})
        if restored is None and self.changed:
            self.clock.reset()
        old = self.saved is not None and not records  # older versions wrote no run.json
        changes = self._changes_now(record.get("commit", "unknown" if old else self.commit))
        self._changes = _merge(record.get("changes", []), restored, changes)
        if jax.process_index() == 0:
            self.workdir.mkdir(parents=True, exist_ok=True)
            record = {"commit": self.commit, "changes": self._changes}
            write_json(path, records | {self.job: record})  # first: no change without its record
            path, saved = self.workdir / "config.json", _besides_job(self.saved or {})
            if not path.exists() or saved != _besides_job(self.values):
                write_json(path, json.loads(to_json(self.values)))
        self.clock.__enter__()

    def part(self, name: str) -> Clock:
        """The clock of one part of a sweep, in the folder `name`."""
        return Clock(self.workdir / name / "clock.json", name)

    # At the end

    def row(
        self,
        metrics: Mapping[str, float],
        *,
        seeds: Sequence[int],
        steps: int,
        part: Mapping[str, Any] | None = None,
        wall_seconds: float | None = None,
        job: str = "",
        **ran: Any,
    ) -> ResultRow:
        """The row of this run.

        Args:
          part: what distinguishes this part of a sweep from the others; joins the row's overrides.
          ran: `mesh`, `dtype`, `seconds` of `make_row`.
        """
        return make_row(
            job=job or self.job,
            config=self.config or self.values["name"],
            arg=self.arg,
            overrides={**self.overrides, **(part or {})},
            hashed=self.part_hash if part else hash_of(self.values),
            metrics=metrics,
            seeds=seeds,
            steps=steps,
            wall_seconds=self.clock.seconds if wall_seconds is None else wall_seconds,
            commit=self.commit,
            changes=self._changes,
            **ran,
        )

    def finish(self, row: ResultRow, folder: Path | None = None) -> None:
        """Writes result.json and appends the row to results.jsonl, in `folder` (the workdir)."""
        folder = folder or self.workdir
        if jax.process_index() == 0:
            write_json(folder / "result.json", json.loads(to_json(dataclasses.asdict(row))))
            append_row(folder / "results.jsonl", row)
            log.info("wrote %s", folder / "result.json")

    def _saved_config(self) -> dict[str, Any] | None:
        saved = _read_json(path := self.workdir / "config.json")
        if saved is None and (checkpoints := self.workdir / "checkpoints").is_dir():
            try:  # somebody copied nothing else
                return read_meta(checkpoints).get("config")
            except (FileNotFoundError, DamagedError):
                return None
        if saved is not None and not isinstance(saved, dict):
            raise ConfigError(f"{path} is no config: take another --workdir, or remove it")
        return saved

    def _check_rows(self) -> None:
        """Raises ConfigError if the workdir has rows of another config, but no config.json."""
        for row in read_rows(path := self.workdir / "results.jsonl"):
            if not (self.owns(row, job=row.job) or self.owns(row) or self.owns(row, part=True)):
                raise ConfigError(
                    f"{path} has rows of another config, and no config.json says which: take another --workdir"
                )

    def _changes_now(self, before: str) -> dict[str, list[Any]]:
        """`before`: the commit of the last start."""
        both = self.changed | {k: (NOTHING, value) for k, value in self.added.items()}
        now = {k: [None if v is NOTHING else v for v in pair] for k, pair in both.items()}
        return now | ({"commit": [before, self.commit]} if before != self.commit else {})


def job(
    settings: type | None = None, only: Sequence[str] | None = None
) -> Callable[[Callable[[Run], int]], Callable[[Run], int]]:
    """Makes a function of a Run a job: it runs where the workdir allows it and is not done, and its clock is kept.

    What stops it on the way becomes a line and an exit code: a signal, a loss that is not finite, an evaluation that failed,
    and a saved state that is another version's.

    Args:
      settings: the dataclass of the job's settings, which `launch --help` describes.  only: see `Run.check`.
    """

    def wrap(body: Callable[[Run], int]) -> Callable[[Run], int]:
        @functools.wraps(body)
        def started(run: Run) -> int:
            run.check(only)
            if run.done():
                return 0
            try:
                return body(run)
            except Preempted as stop:
                log.warning("%s; start the same command again to continue", stop)
                return EXIT_PREEMPTED
            except (NonFiniteLoss, EvaluationFailed) as error:
                log.error("error: %s", error)
                return 1
            except StructureError as error:
                if run.changed:
                    raise
                raise _of_another_version(error) from error
            finally:
                run.clock.__exit__()

        started.settings = settings  # pyright: ignore[reportAttributeAccessIssue]
        return started

    return wrap


def _of_another_version(error: StructureError) -> ConfigError:
    """The settings are those of the saved state, so that its parts differ as the code does."""
    first, *lines = str(error).splitlines()
    return ConfigError(
        f"{first.partition(' holds another')[0]} was saved by another version of the code, whose state has other parts "
        f"({lines[0].strip()}; {len(lines)} in all): finish it with that version, or take another --workdir"
    )


def _read_json(path: Path) -> Any:
    """The JSON in a file; None if there is no such file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON ({error}): take another --workdir, or remove it"
        ) from error


def _merge(
    before: Sequence[Mapping[str, Any]], restored: int | None, now: Mapping[str, list[Any]]
) -> list[dict[str, Any]]:
    """All changes by step, those of this start included. A state older than a change has not seen it: it moves there."""
    if restored is None:
        return []
    by_step: dict[int, dict[str, list[Any]]] = {}
    for entry in [*before, {"step": restored, **now}]:
        at = by_step.setdefault(min(entry["step"], restored), {})
        for name, (old, new) in ((k, v) for k, v in entry.items() if k != "step"):
            at[name] = [at[name][0] if name in at else old, new]
    kept = {s: {k: v for k, v in at.items() if v[0] != v[1]} for s, at in by_step.items()}
    return [{"step": step, **at} for step, at in sorted(kept.items()) if at]


def _besides_job(values: Mapping[str, Any]) -> dict[str, Any]:
    return settings_of({k: v for k, v in values.items() if k != "job"})


def _show(value: Any) -> str:
    return "nothing" if value is NOTHING else repr(value)
