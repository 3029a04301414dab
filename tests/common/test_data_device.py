import gc
import itertools
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.data import (
    LoaderSpec,
    array_source,
    prefetch_to_device,
    train_batches,
)


def on_one_device():
    return NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))


def batches_of(n):
    for i in range(n):
        yield {"x": np.full((4, 2), i, np.float32)}


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "prefetch_to_device"]


def test_prefetch_keeps_order_and_ends():
    out = list(prefetch_to_device(batches_of(7), on_one_device()))
    assert [float(b["x"][0, 0]) for b in out] == list(range(7))
    assert all(isinstance(b["x"], jax.Array) for b in out)
    assert not prefetch_threads()


def test_prefetch_asks_for_a_sharding_per_leaf():
    ranks = []

    def sharding(array):
        ranks.append(array.ndim)
        return on_one_device()

    batch = {"image": np.zeros((2, 4, 4, 3)), "label": np.zeros(2)}
    out = next(prefetch_to_device(iter([batch]), sharding))
    assert sorted(ranks) == [1, 4] and out["image"].shape == (2, 4, 4, 3)


def test_batches_of_the_wrong_size_are_refused_by_their_rows():
    whole = r"has 4 rows, but the devices of process 0 hold rows 0 to 7 of the global 8"
    with pytest.raises(ValueError, match=whole):
        next(prefetch_to_device(batches_of(1), on_one_device(), batch=8))


def test_prefetch_raises_after_the_good_batches():
    def failing():
        yield from batches_of(2)
        raise OSError("disk gone")

    it = prefetch_to_device(failing(), on_one_device())
    assert [float(next(it)["x"][0, 0]) for _ in range(2)] == [0, 1]
    for _ in range(2):  # and goes on raising, where it would otherwise wait forever
        with pytest.raises(OSError, match="disk gone"):
            next(it)


def test_prefetch_runs_ahead_by_depth_and_no_further():
    drawn = []

    def counting():
        for i in itertools.count():
            drawn.append(i)
            yield {"x": np.zeros(1, np.float32)}

    with prefetch_to_device(counting(), on_one_device(), depth=3):
        deadline = time.monotonic() + 30
        while len(drawn) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(drawn) == 4  # three queued, one in the thread's hand
    with pytest.raises(ValueError, match="depth"):
        prefetch_to_device(counting(), on_one_device(), depth=0)


def test_closing_stops_the_thread_and_closes_the_source():
    source = train_batches(array_source(x=np.zeros((9, 2))), LoaderSpec(4, seed=0))
    it = prefetch_to_device(source, on_one_device())
    next(it)
    it.close()
    it.close()
    assert not prefetch_threads()
    with pytest.raises(StopIteration):
        next(it)
    with pytest.raises(ValueError, match="closed"):
        next(source)


def test_an_abandoned_prefetcher_is_collected():
    it = prefetch_to_device(iter(itertools.cycle(batches_of(1))), on_one_device())
    next(it)
    del it
    gc.collect()
    assert not prefetch_threads()
