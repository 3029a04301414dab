"""Views of a source: a random part of it, and one that goes on without records that cannot be read."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from grain.experimental import index_shuffle

from common.images import UnreadableImage

SUBSET_SEED = 748_160_293  # of no run: every run, at every step, evaluates on the same images
_STAND_IN_KEY = 519_402_877  # of the search for a record in place of one that cannot be read
_STAND_IN_TRIES = 64  # where half of all images are bad, all of them fail once in 2**64

log = logging.getLogger("triptych")


def subset(source: Any, n: int | None, seed: int = SUBSET_SEED) -> Any:
    """A random part of a source: `n` of its records, the first n of a permutation that `seed` keys.

    Sources may be sorted, a folder by class for one, so their own first n are no sample. A smaller part
    lies in every larger one. None, or at least the source's length, gives the source itself.
    """
    if n is not None and n < 1:
        raise ValueError(f"n={n}: a part has at least 1 record, and None means all")
    total = len(source)
    if n is None or n >= total:
        return source
    chosen = [index_shuffle(i, max_index=total - 1, seed=seed, rounds=4) for i in range(n)]
    return Subset(source, tuple(chosen))


class Subset:
    """The records of `source` at `indices`, in that order."""

    def __init__(self, source: Any, indices: tuple[int, ...]):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Any:
        return self.source[self.indices[i]]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return read(self.source, [self.indices[i] for i in indices])

    def unreadable(self, indices: Iterable[int]) -> dict[int, str]:
        """Those of `indices` that were read and found bad, with the reason."""
        of_view = {self.indices[i]: i for i in indices}
        return {of_view[j]: why for j, why in bad_records(self.source, of_view).items()}

    def report(self, found: dict[int, str]) -> None:
        """Logs and counts bad records: each once."""
        report(self.source, {self.indices[i]: why for i, why in found.items()})


class Skipping:
    """`source`, with another of its records in place of each that cannot be read.

    Which one is a function of the record's index and of what can be read, so that batches are the
    same for any number of processes and workers, and after a resume. An evaluation gives stand-ins
    weight 0 instead (`unreadable`). `skipped` holds what this process has met, and why it is bad.
    """

    def __init__(self, source: Any):
        self.source = source
        self.skipped: dict[int, str] = {}
        self._bad: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "source" or name.startswith("_"):  # while it is unpickled, there is none
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        if not any(i in self._bad for i in indices):
            try:
                return read(self.source, indices)
            except UnreadableImage:
                pass  # one of them: which, the reads one by one will tell
        return [self._one(i) for i in indices]

    def unreadable(self, indices: Iterable[int]) -> dict[int, str]:
        """Those of `indices` that were read and found bad, with the reason."""
        return {i: self._bad[i] for i in indices if i in self._bad}

    def report(self, found: dict[int, str]) -> None:
        """Logs and counts bad records: each once."""
        for i, why in found.items():
            if i not in self.skipped:
                self.skipped[i] = why
                log.warning("skipped: %s", why)

    def _one(self, i: int) -> Any:
        record = self._try(i)
        if record is not None:
            return record
        rng = np.random.default_rng((_STAND_IN_KEY, i))
        for j in rng.integers(len(self.source), size=_STAND_IN_TRIES).tolist():
            if (record := self._try(j)) is not None:
                return record
        raise UnreadableImage(
            f"{self._bad[i]}, and neither can {_STAND_IN_TRIES} others that were tried in its place",
            "look at how this set was made",
        )

    def _try(self, i: int) -> Any:
        if i in self._bad:
            return None
        try:
            return self.source[i]
        except UnreadableImage as error:
            self._bad[i] = error.problem
            return None


def read(source: Any, indices: Sequence[int]) -> list[Any]:
    """The records at `indices`, in bulk where the source can."""
    bulk = getattr(source, "__getitems__", None)
    return bulk(indices) if bulk else [source[i] for i in indices]


def bad_records(source: Any, indices: Iterable[int]) -> dict[int, str]:
    """Those of `indices`, all read before, for which `source` handed out another record, with the reason."""
    find = getattr(source, "unreadable", None)
    return find(indices) if find else {}


def report(source: Any, found: dict[int, str]) -> None:
    """Logs and counts the bad records of a source, each once in this process."""
    if found:
        source.report(found)


def skipped(source: Any) -> tuple[int, list[int]]:
    """(files left out when a folder was opened, indices of the records that this process has met and skipped)."""
    met = sorted(source.skipped) if isinstance(source, Skipping) else []
    return getattr(origin(source), "left_out", 0), met


def origin(source: Any) -> Any:
    """The source below all views."""
    while isinstance(source, (Subset, Skipping)):
        source = source.source
    return source
