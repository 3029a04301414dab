"""Batches as a pure function of (source, seed, step), by grain.

Row g of the endless stream holds record `shuffled(g)`, a new permutation for every epoch. Step t of
a run with global batch B is rows t*B .. (t+1)*B - 1, of which a process reads those that its devices
hold (`common.sharding.rows_held`). Augmentation draws from a generator keyed by (seed, g). Nothing
here depends on how many processes or workers there are, nor on where a run resumed.

grain schedules, and what flows through it is step numbers: a batch is shuffled, read, transformed
and stacked in one call. A chain of grain's per-record stages gives the same guarantees, but costs
about 20 us an example in bookkeeping, and cannot read in bulk.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle

from common.data.sources import Record, Source
from common.data.views import bad_records, read, report
from common.images import ImageError
from common.sharding import Rows

Batch = dict[str, np.ndarray]
Transform = Callable[[Record, np.random.Generator], Record]
BatchTransform = Callable[[Batch, np.ndarray], Batch]

_EVAL_SEED = 0


@dataclass(frozen=True)
class LoaderSpec:
    """How to draw training batches.

    batch: examples per step over all processes. seed: of order and augmentation, in [0, 2**32).
    workers: processes that prepare batches; 0 is a thread of this one.
    held: the rows of each global batch that this process reads, as parts (start, stop) in order;
        None for all. Of several processes, those whose devices hold the same rows read the same.
    prefetch: host batches prepared ahead (per worker); 0 prepares each when it is asked for.

    Why 0 workers by default: a worker starts a Python that imports grain and jax (2 to 3 s),
    caches decoded images again, and pays for moving batches between processes, while the thread's
    heavy part (PIL's decoding and resizing) runs outside the interpreter lock. Workers pay off
    when one thread cannot feed the step, as with ImageNet's large JPEGs on accelerators; give
    about one per spare core. They need a main module guarded by `if __name__ == "__main__"`.
    """

    batch: int
    seed: int
    workers: int = 0
    held: Rows | None = None
    prefetch: int = 2

    def __post_init__(self):
        rows_of(self.batch, self.held)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), got {self.seed}")
        if self.workers < 0 or self.prefetch < 0:
            raise ValueError(f"workers and prefetch must not be negative, got {self}")


def train_batches(
    source: Source,
    spec: LoaderSpec,
    *,
    transform: Transform | None = None,
    batch_transform: BatchTransform | None = None,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Iterates endlessly over this process's part of the global batches, from `start_step` on.

    transform: `(record, rng) -> record` for every example.
    batch_transform: `(batch, rows) -> batch`, where rows int64 [b] are the examples' positions in
        the endless stream, equal for any number of workers and processes: the place to sample
        what belongs to an example but is cheaper in bulk, such as I-JEPA's masks.
    With workers > 0 both, and the source, must pickle.

    An image that cannot be read is an ImageError, also where a worker met it.

    Returns an iterator with a `close()`; each batch is a dict of arrays [b, ...], b being the rows
    in spec.held, or spec.batch. Integers become int32.
    """
    if start_step < 0:
        raise ValueError(f"start_step must not be negative, got {start_step}")
    load = _TrainStep(source, spec, transform, batch_transform)
    steps = grain.MapDataset.range(sys.maxsize // spec.batch)[start_step:].map(load)
    if not spec.workers:
        return _Unpacked(source, steps.to_iter_dataset(_in_thread(spec.prefetch)))
    if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which only scripts parse
        flags.FLAGS.mark_as_parsed()
    # Whole batches are dealt to workers, so that their number cannot change what is in one.
    options = grain.MultiprocessingOptions(
        num_workers=spec.workers, per_worker_buffer_size=max(1, spec.prefetch)
    )
    return _Unpacked(source, steps.to_iter_dataset(_in_thread(0)).mp_prefetch(options))


def eval_batches(
    source: Source, batch: int, *, transform: Transform | None = None, held: Rows | None = None
) -> Iterator[Batch]:
    """Iterates once over the records in order, with a "weight" float32 [b]: 1 real, 0 padding.

    All processes take ceil(N / batch) steps; of each global batch one reads the rows in `held`, or
    all. Weights of the global batches sum to N, so that weighted sums are exact. Padding repeats the
    last record. A record that cannot be read, and that the source skips, has weight 0 as well.
    """
    load = _EvalStep(source, batch, rows_of(batch, held), transform)
    steps = grain.MapDataset.range(-(-len(source) // batch)).map(load)
    return iter(steps.to_iter_dataset(_in_thread(2)))


def fingerprint(source: Source, spec: LoaderSpec, *transforms: Any) -> dict[str, Any]:
    """What decides the stream of global batches, as JSON-able values for a checkpoint.

    Transforms go by their `repr` when they are data (frozen dataclasses, strings), functions by
    their name; None stands for no transform.
    """
    return {
        **getattr(source, "identity", {"name": type(source).__name__}),
        "length": len(source),
        "seed": spec.seed,
        "global_batch": spec.batch,
        "transforms": [_name(t) for t in transforms if t is not None],
    }


def check_fingerprint(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError, showing every entry that differs, unless both describe the same stream."""
    saved, now = json.loads(json.dumps(saved)), json.loads(json.dumps(now))
    absent = "(absent)"
    differences = [
        f"  {key}: saved {saved.get(key, absent)!r}, now {now.get(key, absent)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key, absent) != now.get(key, absent)
    ]
    if differences:
        raise ValueError(
            "the checkpoint was trained on other data, so its step does not name a position in "
            "this stream:\n" + "\n".join(differences) + "\nRestore the saved settings to "
            "continue the run, or start a new run from its parameters alone."
        )


class _Unpacked(Iterator):
    """The batches that `_TrainStep` packed: raises its errors, and reports what it skipped."""

    def __init__(self, source: Source, packed: grain.IterDataset):
        self._source, self._packed = source, iter(packed)

    def __next__(self) -> Batch:
        batch, skipped, problem = next(self._packed)
        if problem:
            raise ImageError(problem)
        report(self._source, dict(skipped))
        return batch

    def close(self) -> None:
        self._packed.close()


@dataclass(frozen=True)
class _TrainStep:
    """Step number -> (batch of this process, its bad records with reasons, an ImageError's text or "").

    As values, which cross to another process as they are; an exception would take its traceback along.
    """

    source: Source
    spec: LoaderSpec
    transform: Transform | None
    batch_transform: BatchTransform | None

    def __call__(self, step: int) -> tuple[Batch, tuple[tuple[int, str], ...], str]:
        rows = step * self.spec.batch + rows_of(self.spec.batch, self.spec.held)
        indices = shuffled(rows, len(self.source), self.spec.seed)
        try:
            batch = _stack(_read(self.source, indices, rows, self.spec.seed, self.transform))
        except ImageError as error:
            return {}, (), str(error)
        batch = self.batch_transform(batch, rows) if self.batch_transform else batch
        return batch, tuple(bad_records(self.source, indices).items()), ""


@dataclass(frozen=True)
class _EvalStep:
    """Step number -> batch of this process, padded after the last record."""

    source: Source
    batch: int
    held: np.ndarray
    transform: Transform | None

    def __call__(self, step: int) -> Batch:
        rows = step * self.batch + self.held
        indices = np.minimum(rows, len(self.source) - 1)
        records = _read(self.source, indices.tolist(), indices, _EVAL_SEED, self.transform)
        bad = bad_records(self.source, indices.tolist())
        report(self.source, bad)
        real = (rows < len(self.source)) & ~np.isin(indices, list(bad))
        return {**_stack(records), "weight": real.astype(np.float32)}


def shuffled(rows: np.ndarray, length: int, seed: int) -> list[int]:
    """The records at `rows`: each epoch of `length` rows is a keyed permutation, at O(1) a row."""
    indices, seeds = [], {}
    for row in rows.tolist():
        epoch, i = divmod(row, length)
        if epoch not in seeds:  # hashed, so that runs with neighbouring seeds share no epoch
            seeds[epoch] = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
        indices.append(index_shuffle(i, max_index=length - 1, seed=seeds[epoch], rounds=4))
    return indices


def _read(
    source: Source, indices: Sequence[int], rows: np.ndarray, seed: int, transform: Transform | None
) -> list[Record]:
    records = read(source, indices)
    if transform is None:
        return records
    return [transform(r, rng) for r, rng in zip(records, _generators(seed, rows), strict=True)]


def _generators(seed: int, rows: np.ndarray) -> Iterator[np.random.Generator]:
    """One independent stream per row, as one Generator that is rewound in place.

    Philox is a keyed function of a 256-bit counter: the seed is the key, and the row the counter's
    top word, which leaves each row 2**192 numbers. Rewinding costs a third of a new Generator.
    """
    bits = np.random.Philox(seed)
    state, rng = bits.state, np.random.Generator(bits)
    for row in rows.tolist():
        state["state"]["counter"][:] = 0, 0, 0, row
        bits.state = state
        yield rng


def _stack(records: Sequence[Record]) -> Batch:
    batch = {}
    for key in records[0]:
        values = [record[key] for record in records]
        try:
            array = np.stack(values)
        except ValueError:
            shapes = sorted({np.shape(value) for value in values})
            raise ValueError(
                f"records differ in the shape of {key!r}: {shapes[0]} and {shapes[-1]}, so they do "
                "not form a batch; pass a transform that brings all to one size, such as "
                "common.augment.RandomResizedCrop or CenterCrop"
            ) from None
        batch[key] = array.astype(np.int32) if array.dtype == np.int64 else array
    return batch


def _in_thread(buffer: int) -> grain.ReadOptions:
    # One thread: a second would only contend for the interpreter lock between two PIL calls.
    return grain.ReadOptions(num_threads=min(1, buffer), prefetch_buffer_size=buffer)


def rows_of(batch: int, held: Rows | None) -> np.ndarray:
    """The rows of a global batch that lie in the parts `held`, int64 [b]; all of them for None."""
    if batch < 1:
        raise ValueError(f"the global batch must be positive, got {batch}")
    parts = ((0, batch),) if held is None else held
    edges = [edge for part in parts for edge in part]
    ordered = all(a < b for a, b in parts) and edges == sorted(edges)
    if not (edges and ordered and edges[0] >= 0 and edges[-1] <= batch):
        raise ValueError(
            f"held={held} must be parts (start, stop) of the global batch's {batch} rows, in order "
            "and without overlap (common.sharding.rows_held)"
        )
    return np.concatenate([np.arange(a, b) for a, b in parts])


def _name(transform: Any) -> str:
    if isinstance(transform, str):
        return transform
    name = getattr(transform, "__qualname__", None) or repr(transform)
    if " at 0x" in name:
        raise ValueError(
            f"transform {name} has no stable name for the checkpoint; make it a function or a "
            "frozen dataclass, or pass its name as a string"
        )
    return name
