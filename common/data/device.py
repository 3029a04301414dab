"""Moves host batches to devices ahead of the step that needs them."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from common.sharding import rows_held

_POLL_S = 0.1  # how soon a blocked thread notices that it should stop


class prefetch_to_device(Iterator):
    """Iterates over device copies of `iterator`'s batches, `depth` of them ready in advance.

    A background thread draws host batches (pytrees of this process's rows) and joins them into
    global arrays. `sharding` is one Sharding for all leaves, or a function of the host array, e.g.
    `common.sharding.batch_sharding(mesh)`. Device memory holds up to depth + 2 batches.

    batch: rows of the global arrays, of which host batches hold those that
        `common.sharding.rows_held(sharding, batch)` tells; None where they hold all.

    A host batch of another number of rows is a ValueError. An exception of the iterator or the
    transfer is raised from `next`, after the batches before it. `close()`, leaving a `with` block,
    garbage collection and interpreter exit stop the thread and close `iterator`.
    """

    def __init__(
        self,
        iterator: Iterator[Any],
        sharding: Sharding | Callable[[np.ndarray], Sharding],
        depth: int = 2,
        *,
        batch: int | None = None,
    ):
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        sharding_of = sharding if callable(sharding) else lambda array: sharding
        self._queue, self._stop = queue.Queue(depth), threading.Event()
        self._error: BaseException | None = None
        # The thread must not hold `self`, or an abandoned prefetcher would never be collected.
        thread = threading.Thread(
            target=_fill,
            args=(iterator, sharding_of, batch, self._queue, self._stop),
            name="prefetch_to_device",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, _shut_down, iterator, self._stop, thread)
        thread.start()

    def __next__(self) -> Any:
        if self._error is None and not self._finalizer.alive:
            raise StopIteration
        if self._error is None:
            batch, self._error = self._queue.get()
        if self._error is not None:
            self.close()
            raise self._error
        return batch

    def close(self) -> None:
        """Stops the thread and closes the iterator; may be called twice."""
        self._finalizer()

    def __enter__(self) -> "prefetch_to_device":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def _global(array: np.ndarray, sharding: Sharding, batch: int | None) -> jax.Array:
    """The global array [batch, ...] of which `array` holds this process's rows."""
    batch = len(array) if batch is None else batch
    held = rows_held(sharding, batch)
    if len(array) != sum(stop - start for start, stop in held):
        parts = ", ".join(f"{start} to {stop - 1}" for start, stop in held)
        raise ValueError(
            f"a host batch has {len(array)} rows, but the devices of process {jax.process_index()} hold rows {parts} "
            f"of the global {batch}: read those (common.sharding.rows_held)"
        )
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    before = np.cumsum([0, *(stop - start for start, stop in held)])

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[0].indices(batch)
        at = next(n + start - a for n, (a, b) in zip(before, held) if a <= start < b)
        return array[(slice(at, at + stop - start), *index[1:])]

    return jax.make_array_from_callback((batch, *array.shape[1:]), sharding, shard)


def _fill(
    iterator, sharding_of, batch: int | None, buffer: queue.Queue, stop: threading.Event
) -> None:
    def put(array: np.ndarray) -> jax.Array:
        return _global(array, sharding_of(array), batch)

    error = None
    while error is None and not stop.is_set():
        moved = None
        try:
            moved = jax.tree.map(put, next(iterator))
        except BaseException as e:
            error = e
        while not stop.is_set():
            try:
                buffer.put((moved, error), timeout=_POLL_S)
                break
            except queue.Full:
                continue


def _shut_down(iterator, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():  # the collector may run in any thread
        thread.join()
    if hasattr(iterator, "close"):
        iterator.close()
