"""Deterministic input pipelines: sources, batches, and the transfer to devices.

    source = open_source("cifar10")                       # random access to records
    sharding = batch_sharding(mesh)
    spec = LoaderSpec(batch=128, seed=0, held=rows_held(sharding, 128))  # what this process reads
    batches = train_batches(source, spec, transform=RandomResizedCrop(32), start_step=step)
    for batch in prefetch_to_device(batches, sharding, batch=128): ...

A batch is a pure function of (source, seed, step). The step is therefore the only data state that a
checkpoint needs, next to a `fingerprint` that guards against resuming with other data.
"""

from common.data.device import prefetch_to_device
from common.data.loader import (
    LoaderSpec,
    Transform,
    check_fingerprint,
    eval_batches,
    fingerprint,
    train_batches,
)
from common.data.on_device import drawn_records, images_on_device
from common.data.sources import Source, array_source, open_source, overlapping
from common.data.views import read, skipped, subset
from common.images import ImageError

__all__ = [
    "ImageError",
    "LoaderSpec",
    "Source",
    "Transform",
    "array_source",
    "check_fingerprint",
    "drawn_records",
    "eval_batches",
    "fingerprint",
    "images_on_device",
    "open_source",
    "overlapping",
    "prefetch_to_device",
    "read",
    "skipped",
    "subset",
    "train_batches",
]
