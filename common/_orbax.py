"""The only file that calls orbax, but for distributed.py's barrier: what it needs to write and read arrays safely and
quietly. common/checkpoint.py says what a checkpoint is, and in one line what went wrong with one.
"""

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp


class Saver:
    """Saves steps in the background, in one directory. Removes what a killed run left half written.

    Args:
      keep, every_steps: see `common.checkpoint.CheckpointSpec`.
    """

    def __init__(self, directory: epath.Path, keep: int, every_steps: int):
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(keep)]
        if every_steps:
            kept.append(policies.EveryNSteps(every_steps))
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
        self._inner = ocp.training.Checkpointer(
            directory,
            context=context,
            preservation_policy=policies.AnyPreservationPolicy(kept),  # pyright: ignore[reportArgumentType]  # orbax annotates one class in two ways
            cleanup_tmp_directories=True,
        )
        self.reload, self.close = self._inner.reload, self._inner.close

    def save(self, step: int, arrays: dict[str, jax.Array], document: dict) -> None:
        """Returns when the arrays are on the host; `document` goes to meta/data.json."""
        items = {"state": _with_elements(arrays), "meta": document}
        self._inner.save_checkpointables_async(step, items, force=True)

    def wait(self) -> None:
        """Returns when the save in flight is on disk; raises what went wrong with it, and another may follow."""
        try:
            self._inner.wait()
        except Exception:
            self._inner.reload()
            raise


def steps_in(directory: epath.Path) -> list[int]:
    """Steps of the complete checkpoints, ascending, as this process sees the folder."""
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(directory))


def read_arrays(directory: epath.Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arrays of the checkpoint in `directory` by name, each with its sharding. A damaged one may give something
    that is no array.

    Each process reads on its own: at orbax's barriers the others would wait for minutes for the one that met damage.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    with context:
        arrays = ocp.load(directory, _with_elements(wanted), checkpointable_name="state")
    empty = {name: leaf for name, leaf in wanted.items() if name not in arrays}
    zeros = {n: jnp.zeros(x.shape, x.dtype, device=x.sharding) for n, x in empty.items()}
    return arrays | zeros


def _with_elements(arrays: dict[str, Any]) -> dict[str, Any]:
    """Orbax refuses empty arrays; the document describes those in full."""
    return {name: leaf for name, leaf in arrays.items() if 0 not in leaf.shape}


def attempt(read: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
    """(read(*args), None), or (None, what was wrong with the files). Raises what is this machine's trouble."""
    problem = None
    with _muted():
        try:
            return read(*args), None
        except Exception as error:
            root: BaseException = error
            while (cause := root.__cause__ or root.__context__) is not None:
                root = cause
            if isinstance(root, jax.errors.JaxRuntimeError | MemoryError):
                raise  # out of memory, say
            problem = f"{type(root).__name__}: {root}"[:300]
            del error, root
        gc.collect()  # here, where what the failed read left complains to nobody
    return None, problem


@contextlib.contextmanager
def _muted():
    """A failed load leaves coroutines and tasks that complain on stderr; the caller says why."""
    asyncio_log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    asyncio_log.disabled, sys.unraisablehook = True, lambda _: None
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        asyncio_log.disabled, sys.unraisablehook = False, hook


def _is_for_users(record: logging.LogRecord) -> bool:
    """Orbax tells of every barrier and thread at INFO, and of a failure, which it raises too, in each thread's traceback."""
    return "orbax" not in record.pathname or (
        record.levelno >= logging.WARNING and not record.exc_info
    )


def _unless_orbax_gave_up(unraisable: "sys.UnraisableHookArgs") -> None:
    """The writes of a save that failed end in tensorstore's threads, which find their event loop closed."""
    if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
        _hook(unraisable)


logging.getLogger("absl").addFilter(_is_for_users)
_hook, sys.unraisablehook = sys.unraisablehook, _unless_orbax_gave_up
