"""Checkpoints: what is in one, how a run saves and restores them, and what is told of one that does not fit.

A checkpoint is a directory `<directory>/<step>/`:

    state/            the arrays, each named by its path: "params/encoder/w", "opt_state/0/mu/..."
    meta/data.json    format version; dtype, shape and fingerprint of each array; the caller's meta

Names alone tie arrays to a state: no library's classes (optax's tuples) are part of the format. The
caller's abstract state gives structure and shardings, so any mesh restores any checkpoint.

A directory has one writer. What reads another run's checkpoints uses `restore_params` and
`read_meta`, which write nothing.
"""

import difflib
import json
import logging
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from common import _orbax
from common.array_fingerprint import array_fingerprint
from common.distributed import barrier, exchange
from common.full_disk import is_full, no_space
from common.paths import check_local

FORMAT_VERSION = 1
T = TypeVar("T")

log = logging.getLogger("triptych")


class StructureError(ValueError):
    """The checkpoint is whole, but it is another model's."""


class DamagedError(RuntimeError):
    """A checkpoint cannot be read back as it was saved."""


@dataclass(frozen=True)
class CheckpointSpec:
    """Which checkpoints are kept.

    Attributes:
      keep: the newest checkpoints that stay. With 2, a damaged newest one costs one save interval and not the run.
      every_steps: multiples of this step are never deleted; 0 for none.
    """

    keep: int = 2
    every_steps: int = 0

    def __post_init__(self):
        if self.keep < 1 or self.every_steps < 0:
            raise ValueError(f"{self}: keep must be at least 1, and every_steps at least 0")


class Checkpointer:
    """Saves and restores the states of one run. As a context manager it waits for the last save.

    Every process of a run calls every method, in the same order. What a killed run left half
    written is removed by the next one's first save.
    """

    def __init__(self, directory: str | PathLike, spec: CheckpointSpec = CheckpointSpec()):
        self._directory = _absolute(directory)
        self._saver = _orbax.Saver(self._directory, spec.keep, spec.every_steps)
        self._current: int | None = None  # the step last saved or restored
        self._abandoned: list[int] = []  # steps newer than the one restored

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        """Raises NoSpaceError if the disk is full, be it in here, in the background, or in what it surrounds."""
        try:
            self.close()
        except Exception as late:
            if not is_full(error):
                error = late
            if not is_full(error):
                raise
        if error is not None and is_full(error):
            last = max(_orbax.steps_in(self._directory), default=None)
            safe = "" if last is None else f"the last good checkpoint is step {last}"
            raise no_space(error, self._directory.parent, safe) from error

    def save(self, step: int, state: Any, meta: Mapping[str, Any], *, wait: bool = False) -> None:
        """Saves a pytree of jax arrays; returns when they are on the host, and may be donated.

        Waits for the save before, and raises what went wrong with it. Does nothing if `step` is the
        one just saved or restored. Checkpoints newer than the one restored (damaged, or passed
        over) belong to a history that ends here: they are renamed to `<step>.abandoned-<time>`.

        Args:
          meta: anything JSON; `restore` and `read_meta` give it back (tuples as lists).
          wait: return only when the checkpoint is on disk.

        Raises:
          FileExistsError: the directory holds that step from another run.
        """
        self.wait()
        if step == self._current:
            return
        if step in set(self.steps()) - set(self._abandoned):
            raise FileExistsError(
                f"{self._directory} holds another run's step {step}: restore it, or save elsewhere"
            )
        arrays, _ = _named(state)
        for name, leaf in arrays.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"state leaf {name} is a {type(leaf).__name__}, not a jax array")
        with jax.transfer_guard("allow"):
            leaves = _manifest(arrays)
            document = {"format_version": FORMAT_VERSION, "leaves": leaves, "meta": dict(meta)}
            if self._abandoned:
                self._set_aside()
            self._saver.save(step, arrays, _sealed(document))
        self._current = step
        if wait:
            self.wait()

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict] | None:
        """(state, meta) of `step`, or of the newest undamaged checkpoint; None if there is none.

        `abstract_state` is a pytree of `jax.ShapeDtypeStruct`, each with a sharding.

        Raises:
          StructureError: lists every array that is missing, unexpected or misshapen.
          DamagedError: `step`, or every checkpoint there is, is damaged.
          FileNotFoundError: there is no such step.
        """
        self.wait()
        if step is None and not self.steps():
            return None
        read = partial(_load, self._directory, abstract=abstract_state)
        at, state, meta = _newest_intact(self._directory, step, read)
        self._current, self._abandoned = at, [s for s in self.steps() if s > at]
        return state, meta

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return _steps(self._directory)

    def wait(self) -> None:
        """Returns when the save in flight is on disk; raises what went wrong with it."""
        try:
            self._saver.wait()
        except Exception:
            self._current = None
            raise

    def close(self) -> None:
        """Waits, and ends the threads that save."""
        try:
            self.wait()
        finally:
            self._saver.close()

    def _set_aside(self) -> None:
        for step in self._abandoned if jax.process_index() == 0 else ():
            target = self._directory / f"{step}.abandoned-{time.strftime('%Y%m%d-%H%M%S')}"
            (self._directory / str(step)).rename(target)
            log.warning(f"checkpoint {step} is set aside as {target}")
        barrier("checkpoint set aside")
        self._abandoned = []
        self._saver.reload()


def read_meta(directory: str | PathLike, step: int | None = None) -> dict:
    """The caller's meta of `step`, or of the newest undamaged one. Raises as `restore_params`."""
    directory = _absolute(directory)
    return _newest_intact(directory, step, lambda step: _document(directory, step))["meta"]


def restore_params(
    directory: str | PathLike,
    abstract_params: Any,
    path: tuple[str, ...] = ("params",),
    step: int | None = None,
) -> Any:
    """The part of a state below `path`, say ("params", "encoder"); () is all. Only it is read.

    Raises as `Checkpointer.restore`, and FileNotFoundError where there is no checkpoint.
    """
    directory = _absolute(directory)
    read = partial(_load, directory, abstract=abstract_params, path=path)
    return _newest_intact(directory, step, read)[1]


def _absolute(directory: str | PathLike) -> epath.Path:
    check_local(directory, "the checkpoint directory")
    return epath.Path(directory).expanduser().absolute()


def _steps(directory: epath.Path) -> list[int]:
    """The first process lists them: caches of shared storage may show an older or newer folder to another."""
    found = _orbax.steps_in(directory) if jax.process_index() == 0 else []
    return json.loads(exchange("checkpoints", json.dumps(found))[0])


def _newest_intact(directory: epath.Path, step: int | None, read: Callable[[int], T]) -> T:
    """`read` of `step`, or of the newest step in which it finds no damage."""
    steps = _steps(directory)
    candidates = [s for s in reversed(steps) if step in (None, s)]
    if not candidates:
        which = "checkpoint" if step is None else f"checkpoint {step}"
        raise FileNotFoundError(f"no {which} in {directory}; it holds steps {steps}")
    damage: list[str] = []
    for candidate in candidates:
        if damage:
            log.warning(f"{damage[-1]}; falling back to step {candidate} in {directory}")
        try:
            return read(candidate)
        except DamagedError as error:
            damage.append(f"checkpoint {candidate} is damaged ({error})")
    raise DamagedError(f"no whole checkpoint in {directory}: " + "; ".join(damage))


def _load(directory: epath.Path, step: int, abstract: Any, path=()) -> tuple[int, Any, dict]:
    document = _document(directory, step)
    wanted, treedef = _named(abstract, path)
    wanted = {name: _placed(name, leaf) for name, leaf in wanted.items()}
    below = "".join(f"{key}/" for key in path)
    saved = {n: leaf for n, leaf in document["leaves"].items() if f"{n}/".startswith(below)}
    _check_structure(saved, wanted, directory / str(step))
    arrays = _together(_read_arrays, directory / str(step), wanted)
    manifest = _manifest(arrays)
    if changed := [name for name in wanted if manifest[name] != saved[name]]:
        raise DamagedError(f"the content of {', '.join(changed)} is not what was saved")
    return step, treedef.unflatten(arrays[name] for name in wanted), document["meta"]


def _placed(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        sharding.shard_shape(leaf.shape)
    except ValueError as error:  # the caller's mistake, which loading would take for damage
        raise ValueError(f"abstract leaf {name}: {error}") from None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _read_arrays(directory: epath.Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    arrays = _orbax.read_arrays(directory, wanted)
    for name in wanted:
        if not isinstance(arrays[name], jax.Array):  # what damaged tree metadata can lead to
            raise DamagedError(f"no data for {name}")
    return arrays


def _named(tree: Any, path: tuple[str, ...] = ()) -> tuple[dict[str, Any], Any]:
    """Leaves by name, the keys on the way to each joined by "/"; and the tree's structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    named = {}
    for keys, leaf in leaves:
        name = "/".join([*path, *(jax.tree_util.keystr((key,), simple=True) for key in keys)])
        if name in named:
            raise ValueError(f"two leaves of the state are named {name!r}: rename a key")
        named[name] = leaf
    return named, treedef


def _sealed(document: dict) -> dict:
    document = json.loads(json.dumps(document))
    return document | {"crc32": zlib.crc32(json.dumps(document, sort_keys=True).encode())}


def _document(directory: epath.Path, step: int) -> dict:
    path = directory / str(step) / "meta" / "data.json"

    def read() -> dict:
        document = json.loads(path.read_text())
        crc32 = document.pop("crc32")
        if _sealed(document)["crc32"] != crc32:
            raise DamagedError("meta/data.json does not match its checksum")
        return document

    document = _together(read)
    if (version := document["format_version"]) > FORMAT_VERSION:
        raise ValueError(f"{path}: format {version} is newer than {FORMAT_VERSION}; update common")
    return document


def _check_structure(saved: dict[str, list], wanted: dict[str, Any], where: epath.Path) -> None:
    def near(name: str, others) -> str:
        found = difflib.get_close_matches(name, sorted(others), n=1)
        return f" (nearest: {found[0]})" if found else ""

    missing, unexpected = wanted.keys() - saved.keys(), saved.keys() - wanted.keys()
    lines = [f"  missing: {name}{near(name, unexpected or saved)}" for name in sorted(missing)]
    lines += [f"  unexpected: {name}{near(name, missing or wanted)}" for name in sorted(unexpected)]
    for name in sorted(wanted.keys() & saved.keys()):
        has, leaf = saved[name], wanted[name]
        if has[:2] != [str(leaf.dtype), list(leaf.shape)]:
            in_model = f"{leaf.dtype}{list(leaf.shape)} in the model"
            lines.append(f"  misshapen: {name} is {has[0]}{has[1]} in the checkpoint, {in_model}")
    if lines:
        raise StructureError(
            f"{where} holds another model. Use the config it was saved with (see its meta), or take "
            "the part that fits with restore_params.\n" + "\n".join(lines)
        )


def _manifest(arrays: dict[str, jax.Array]) -> dict[str, list]:
    """[dtype, shape, fingerprint] of each."""
    # One at a time: dozens of programs with collectives in flight deadlock XLA's small CPU thread pool.
    fingerprints = [jax.device_get(array_fingerprint(leaf)) for leaf in arrays.values()]
    return {
        name: [str(leaf.dtype), list(leaf.shape), int(fingerprint)]
        for (name, leaf), fingerprint in zip(arrays.items(), fingerprints)
    }


def _together(read: Callable[..., T], *args: Any) -> T:
    """read(*args); DamagedError on every process if it fails on any."""
    result, problem = _orbax.attempt(read, *args)
    if np.any(multihost_utils.process_allgather(np.int32(problem is not None))):
        raise DamagedError(problem or "another process could not read its part")
    return result
