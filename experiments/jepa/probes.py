"""Evaluations of a frozen I-JEPA encoder: what the pretraining job runs online, and the probes at the end."""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.progress import Progress

from common.augment import normalize
from common.data import Source, eval_batches, prefetch_to_device, read, skipped, subset
from common.data.sources import is_number
from common.progress import draws_bars
from common.recipe import EvalFn
from common.sharding import batch_sharding, batch_ways, rows_held
from experiments.jepa.settings import Settings
from jepa import monitors
from jepa.encoder import Encoder
from jepa.probe import Features, extract, knn, labelled, probable_labels, probe_all

log = logging.getLogger("triptych")
TOKEN_IMAGES = 256  # images whose tokens the collapse monitors read


def label_names(source: Source) -> tuple[str, ...]:
    """The label sets of a source: its integer entries, without those whose names say that they number the images."""
    return tuple(
        name
        for name, value in source[0].items()
        if np.ndim(value) == 0
        and np.issubdtype(np.asarray(value).dtype, np.integer)
        and not is_number(name)
    )


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
    settings: Settings,
    mesh: Mesh,
    encode: Callable,
    source: Source,
    n: int | None = None,
    what: str = "",
) -> Features:
    """Pooled features of `n` random images (None: all), centre-cropped and not augmented.

    Always of the same ones: they depend on the source and on n alone. Batches are spread over the mesh, and each process
    reads the rows that its devices hold. `what` names the progress bar; without it there is none.
    """
    source = subset(source, n)
    total = len(source)
    shards = batch_ways(mesh)
    batch = shards * max(8, -(-256 // shards))
    host = eval_batches(
        source,
        batch,
        transform=settings.evaluation_crop,
        held=rows_held(batch_sharding(mesh), batch),
    )
    gather = functools.partial(multihost_utils.process_allgather, tiled=True)
    with (
        jax.set_mesh(mesh),
        prefetch_to_device(host, batch_sharding(mesh), batch=batch) as batches,
        Progress(disable=not (what and draws_bars()), transient=True) as bar,
    ):
        task = bar.add_task(what, total=-(-total // batch))
        return extract(
            encode,
            batches,
            labels=label_names(source),
            to_host=gather if jax.process_count() > 1 else np.asarray,
            rows=total,
            progress=lambda stage, i, n: bar.update(task, completed=i),
        )


def online_monitor(settings: Settings, mesh: Mesh, source: Source, test_source: Source) -> EvalFn:
    """An EvalFn: kNN accuracy per label set and collapse monitors of the target encoder, on fixed subsets."""
    encoder, probe = settings.recipe.encoder, settings.probe
    shards = batch_ways(mesh)
    n_tokens = max(1, min(TOKEN_IMAGES, len(test_source)) // shards) * shards
    shown = read(subset(test_source, n_tokens), range(min(n_tokens, len(test_source))))
    crops = [settings.evaluation_crop(r, np.random.default_rng(0))["image"] for r in shown]
    images = np.stack([crops[i % len(crops)] for i in range(n_tokens)])
    told: set[str] = set()

    def evaluate(state) -> Iterable[tuple[str, float]]:
        encode = encode_fn(encoder, state.extra["target"])
        bank = features(settings, mesh, encode, source, probe.knn_train)
        test = features(settings, mesh, encode, test_source, probe.knn_test)
        for name in _probable(bank, test, probe.neighbors, told):
            (of_bank, labels), (of_test, asked) = labelled(bank, name), labelled(test, name)
            classes = int(max(labels.max(), asked.max())) + 1
            args = of_bank.last, labels, of_test.last, asked, classes
            yield f"knn_{name}", knn(*args, k=probe.neighbors)
        yield from monitors.report(encode(images)[0], settings.recipe.model.grid).items()
        yield "rankme", float(monitors.rankme(test.last))  # over more images than features
        if skipped_images := _skipped(source, test_source):
            yield "skipped_images", float(skipped_images)

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
    held-out accuracy (docs/papers/ijepa.md 2). Where images were skipped or set aside for the test, also
    "skipped_images" (how many) and "held_out" (the share).
    """
    probe, spec = settings.probe, settings.probe.spec(settings.train.seed)
    if not label_names(source):
        log.warning("no linear probe: %s has no labels", settings.data.name)
        return _left_out(source, test_source)
    train = features(settings, mesh, encode, source, probe.train_examples, f"{what}: train")
    test = features(settings, mesh, encode, test_source, probe.test_examples, f"{what}: test")
    _probable(train, test, 2, set())
    with Progress(transient=True, disable=not draws_bars()) as bar:
        task = bar.add_task(f"{what}: linear probes")
        results = probe_all(
            train, test, spec, lambda stage, i, n: bar.update(task, completed=i, total=n)
        )
    accuracies = {f"linear_{name}": result.accuracy for name, result in results.items()}
    return accuracies | _left_out(source, test_source)


def _probable(train: Features, test: Features, least: int, told: set[str]) -> tuple[str, ...]:
    """The label sets to probe; the reason for each other one goes to the log, once for all that share `told`."""
    names, others = probable_labels(train, test, least)
    for name in others.keys() - told:
        log.warning("no probe of %r: %s", name, others[name])
    told.update(others)
    return names


def _left_out(source: Source, test_source: Source) -> dict[str, float]:
    """What a row says of its images: how many were skipped, and the share held out; no entry where there is none."""
    found = {}
    if count := _skipped(source, test_source):
        found["skipped_images"] = float(count)
    if share := getattr(test_source, "identity", {}).get("held_out"):
        found["held_out"] = float(share)
    return found


def _skipped(source: Source, test_source: Source) -> int:
    """How many images were skipped since this run was started, by any process, when folders were opened or later."""
    sources = [source] if test_source is source else [source, test_source]
    return sum(_everywhere(*skipped(s)) for s in sources)


def _everywhere(left_out: int, met: list[int]) -> int:
    """How many images all processes together skipped: `left_out`, which all know of, and those that any has met."""
    if jax.process_count() == 1:
        return left_out + len(met)
    most = int(np.max(multihost_utils.process_allgather(np.int32(len(met)))))
    padded = np.full(most + 1, -1, np.int32)
    padded[: len(met)] = met
    return left_out + len(set(np.ravel(multihost_utils.process_allgather(padded)).tolist()) - {-1})
