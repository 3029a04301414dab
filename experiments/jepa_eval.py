"""Evaluations of a frozen I-JEPA encoder: what the pretraining job runs online, and the probes at the end."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.progress import Progress

from common.augment import normalize
from common.data import Source, eval_batches, prefetch_to_device
from common.recipe import EvalFn
from common.sharding import batch_sharding, batch_ways, rows_held
from experiments.jepa_settings import Settings
from jepa import monitors
from jepa.encoder import Encoder
from jepa.probe import Features, ProbeSpec, extract, knn, probe_all

TOKEN_IMAGES = 256  # images whose tokens the collapse monitors read


def label_names(source: Source) -> tuple[str, ...]:
    """The label sets of a source: its integer entries, without the scenes' running index."""
    return tuple(k for k in source[0] if k not in ("image", "index"))


def encode_fn(encoder: Encoder, params: Any) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
    """uint8 images [B, H, W, 3] -> (last layer [B, N, D], last four layers [4, B, N, D]) of `params`."""
    return functools.partial(_encode, encoder, params)


@functools.partial(jax.jit, static_argnums=0)
def _encode(encoder: Encoder, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    layers_LBND = encoder.layers(params, normalize(images), min(4, encoder.config.depth))
    return layers_LBND[-1], layers_LBND


def pixels(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Raw pixels as features, halved to at most 32x32: a stand-in for `encode_fn` that shows what needs no learning."""
    while images.shape[1] > 32:
        B, H, W, C = images.shape
        images = images.reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))
    flat = np.asarray(images, np.float32).reshape(len(images), 1, -1) / 255
    return flat, flat[None]


def features(
    settings: Settings, mesh: Mesh, encode: Callable, source: Source, n: int = 0, what: str = ""
) -> Features:
    """Pooled features of the first `n` images (0: all), centre-cropped and not augmented.

    Batches are spread over the mesh, and each process reads the rows that its devices hold. `what` names the progress bar;
    without it there is none.
    """
    total = min(n, len(source)) if n else len(source)
    shards = batch_ways(mesh)
    batch = shards * max(8, -(-256 // shards))
    host = eval_batches(
        _First(source, total),
        batch,
        transform=settings.evaluation_crop,
        held=rows_held(batch_sharding(mesh), batch),
    )
    gather = functools.partial(multihost_utils.process_allgather, tiled=True)
    with (
        jax.set_mesh(mesh),
        prefetch_to_device(host, batch_sharding(mesh), batch=batch) as batches,
        Progress(disable=not what, transient=True) as bar,
    ):
        task = bar.add_task(what, total=-(-total // batch))
        return extract(
            encode,
            batches,
            labels=label_names(source),
            to_host=gather if jax.process_count() > 1 else np.asarray,
            progress=lambda stage, i, n: bar.update(task, completed=i),
        )


def online_monitor(settings: Settings, mesh: Mesh, source: Source, test_source: Source) -> EvalFn:
    """An EvalFn: kNN accuracy per label set and collapse monitors of the target encoder, on fixed subsets."""
    encoder, probe = settings.recipe.encoder, settings.probe
    shards = batch_ways(mesh)
    n_tokens = max(1, min(TOKEN_IMAGES, len(test_source)) // shards) * shards
    images = np.stack([
        settings.evaluation_crop(test_source[int(i)], np.random.default_rng(0))["image"]
        for i in np.arange(n_tokens) % len(test_source)
    ])  # fmt: skip

    def evaluate(state) -> Iterable[tuple[str, float]]:
        encode = encode_fn(encoder, state.extra["target"])
        bank = features(settings, mesh, encode, source, probe.knn_train)
        test = features(settings, mesh, encode, test_source, probe.knn_test)
        for name, labels in bank.labels.items():
            classes = int(max(labels.max(), test.labels[name].max())) + 1
            yield f"knn_{name}", knn(bank.last, labels, test.last, test.labels[name], classes)
        yield from monitors.report(encode(images)[0], settings.recipe.model.grid).items()
        yield "rankme", float(monitors.rankme(test.last))  # over more images than features

    return evaluate


def linear_probes(
    settings: Settings,
    mesh: Mesh,
    encode: Callable,
    source: Source,
    test_source: Source,
    what: str = "features",
) -> dict[str, float]:
    """Linear probe test accuracies on frozen features.

    Returns {"linear_<label>/last", "linear_<label>/last4", "linear_<label>"}; the last is the better of the two by
    held-out accuracy (spec 2).
    """
    probe = settings.probe
    spec = ProbeSpec(epochs=probe.epochs, batch=probe.batch, seed=settings.train.seed)
    train = features(settings, mesh, encode, source, probe.train_examples, f"{what}: train")
    test = features(settings, mesh, encode, test_source, probe.test_examples, f"{what}: test")
    with Progress(transient=True) as bar:
        task = bar.add_task(f"{what}: linear probes")
        results = probe_all(
            train, test, spec, lambda stage, i, n: bar.update(task, completed=i, total=n)
        )
    return {f"linear_{name}": result.accuracy for name, result in results.items()}


class _First:
    """The first n records of a source."""

    def __init__(self, source: Source, n: int):
        self._source, self._n = source, n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> Any:
        return self._source[i]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        bulk = getattr(self._source, "__getitems__", None)
        return bulk(indices) if bulk else [self._source[i] for i in indices]
