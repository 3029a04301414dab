"""The TFDS dataset `scenes`, written as array_record without TensorFlow.

    prepare(data_dir)  # once
    source = Scenes(data_dir=data_dir).as_data_source(split="train")
    source[3]  # {"image": uint8[64, 64, 3], "count": 4, "distance": 1, "shape": 0, "index": 3}

Record i of `train` is scene i of the seed's world and record i of `test` is scene `TEST_START + i`,
for all sizes of the splits and the number of worker processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from rich.progress import track

from common.datasets.scenes.render import SIZE
from common.datasets.scenes.sample import DISTANCE_EDGES, MAX_OBJECTS, MIN_OBJECTS, SHAPES, example

TEST_START = 1_000_000_000  # scenes from here on are the test world's
REMEDY = 'Call prepare under `if __name__ == "__main__":`, or pass workers=1 to start no process.'
SCENES_PER_WORKER = 500  # fewer do not pay for starting a process


@dataclasses.dataclass(eq=False)
class SceneConfig(tfds.core.BuilderConfig):
    """What a prepared folder holds: the sizes of its splits and the seed of its world."""

    train: int = 20_000
    test: int = 4_000
    seed: int = 0


DEFAULT = SceneConfig(name="default")


def scene_config(
    train: int = DEFAULT.train, test: int = DEFAULT.test, seed: int = DEFAULT.seed
) -> SceneConfig:
    """Returns the config, and so the folder, of these sizes and this seed.

    Raises:
      ValueError: if a split would be empty, or reach into the other's scenes.
    """
    if not (1 <= train <= TEST_START and 1 <= test <= TEST_START):
        raise ValueError(f"scenes: train={train}, test={test}; both must be in [1, {TEST_START}].")
    if not 0 <= seed < 2**64:
        raise ValueError(f"scenes: seed={seed} must be in [0, 2**64).")
    if (train, test, seed) == (DEFAULT.train, DEFAULT.test, DEFAULT.seed):
        return DEFAULT
    name = f"train{train}_test{test}_seed{seed}"
    return SceneConfig(name=name, train=train, test=test, seed=seed)


class Scenes(tfds.core.GeneratorBasedBuilder):
    """CLEVR-like scenes; `config` is a name, a `SceneConfig`, or None for the default sizes."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS: ClassVar[list[SceneConfig]] = [DEFAULT]
    builder_config: SceneConfig
    workers: int | None = None
    progress: bool = True

    def _info(self) -> tfds.core.DatasetInfo:
        counts = [str(n) for n in range(MIN_OBJECTS, MAX_OBJECTS + 1)]
        edges = [0.0, *DISTANCE_EDGES, float("inf")]
        bins = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "Rendered spheres, cubes and cylinders on a plane, after CLEVR: how many, "
                "how far the nearest one is from the camera, and what shape that one has."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "count": tfds.features.ClassLabel(names=counts),
                    "distance": tfds.features.ClassLabel(names=bins),
                    "shape": tfds.features.ClassLabel(names=SHAPES),
                    "index": tfds.features.Scalar(np.int64),
                }
            ),
            disable_shuffling=True,  # scenes are independent draws; record i stays scene i
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        config = self.builder_config
        return {
            "train": self._generate_examples("train", range(config.train)),
            "test": self._generate_examples("test", range(TEST_START, TEST_START + config.test)),
        }

    def _generate_examples(self, split: str, indices: range) -> Iterator[tuple[int, dict]]:
        with _mapper(self.workers, len(indices)) as map_examples:
            records = map_examples(partial(example, self.builder_config.seed), indices)
            shown = track(records, f"scenes {split}", total=len(indices), disable=not self.progress)
            yield from enumerate(shown)


@contextlib.contextmanager
def _mapper(workers: int | None, size: int) -> Iterator[Any]:
    """Gives a `map` that keeps order, in this process or over freshly spawned ones."""
    if workers is None:
        workers = min(os.cpu_count() or 1, size // SCENES_PER_WORKER)
    if workers <= 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of jax's threads
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield partial(pool.map, chunksize=32)


@contextlib.contextmanager
def _alone(data_dir: str | os.PathLike) -> Iterator[None]:
    """Holds off other processes of this machine that prepare scenes in the same place."""
    if "://" in os.fspath(data_dir):
        yield  # a bucket has no locks; the last to finish fails to rename, and loses nothing
        return
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(data_dir) / ".scenes.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare(
    data_dir: str | os.PathLike,
    *,
    train: int = DEFAULT.train,
    test: int = DEFAULT.test,
    seed: int = DEFAULT.seed,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Renders and writes the dataset, unless it is there already.

    Other sizes or seeds go to folders of their own: read them with `Scenes(data_dir=...,
    config=scene_config(train, test, seed))`. The files appear under their final name only when
    complete, and they are the same bytes for any number of workers. Switches tfds's own progress
    bars off while it runs.

    Args:
      data_dir: the TFDS data folder.
      train, test: sizes of the splits.
      seed: number of the world.
      workers: processes to render with; None is one a core, and 1 renders in this process.
      progress: show a progress bar.

    Raises:
      ValueError: from `scene_config`.
      RuntimeError: if a worker process dies, or a script calls this as its workers import it.
    """
    config = scene_config(train, test, seed)
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker that imports its parent's script, which holds the lock, would wait forever.
        raise RuntimeError(f"prepare was called while a worker process starts. {REMEDY}")
    with _alone(data_dir):
        builder = Scenes(data_dir=os.fspath(data_dir), config=config)
        builder.workers, builder.progress = workers, progress
        tfds.disable_progress_bar()
        try:
            builder.download_and_prepare(file_format="array_record")
        except BrokenProcessPool as error:
            raise RuntimeError(f"A worker process died (workers={workers}). {REMEDY}") from error
        finally:
            tfds.enable_progress_bar()
