"""Moves host batches to devices ahead of the step that needs them."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

_POLL_S = 0.1  # how soon a blocked thread notices that it should stop


class prefetch_to_device(Iterator):
    """Iterates over device copies of `iterator`'s batches, `depth` of them ready in advance.

    A background thread draws host batches (pytrees of this process's rows) and joins them into
    global arrays. `sharding` is one Sharding for all leaves, or a function of the host array, e.g.
    `common.sharding.batch_sharding(mesh)`. Device memory holds up to depth + 2 batches.

    An exception of the iterator or the transfer is raised from `next`, after the batches before
    it. `close()`, leaving a `with` block, garbage collection and interpreter exit stop the thread
    and close `iterator`.
    """

    def __init__(
        self,
        iterator: Iterator[Any],
        sharding: Sharding | Callable[[np.ndarray], Sharding],
        depth: int = 2,
    ):
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        sharding_of = sharding if callable(sharding) else lambda array: sharding
        self._queue, self._stop = queue.Queue(depth), threading.Event()
        self._error: BaseException | None = None
        # The thread must not hold `self`, or an abandoned prefetcher would never be collected.
        thread = threading.Thread(
            target=_fill,
            args=(iterator, sharding_of, self._queue, self._stop),
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


def _fill(iterator, sharding_of, buffer: queue.Queue, stop: threading.Event) -> None:
    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding_of(array), array)

    error = None
    while error is None and not stop.is_set():
        batch = None
        try:
            batch = jax.tree.map(put, next(iterator))
        except BaseException as e:
            error = e
        while not stop.is_set():
            try:
                buffer.put((batch, error), timeout=_POLL_S)
                break
            except queue.Full:
                continue


def _shut_down(iterator, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():  # the collector may run in any thread
        thread.join()
    if hasattr(iterator, "close"):
        iterator.close()
