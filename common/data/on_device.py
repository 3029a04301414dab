"""A training set that is wholly on the device: a step then gets the numbers of its records, and makes its batch itself.

Which records a step takes is the host loader's rule (`common.data.loader`): the same ones in the same order.
"""

import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from common.data.loader import Batch, LoaderSpec, rows_of, shuffled
from common.data.sources import Source
from common.data.views import bad_records, read, report
from common.profiling import device_memory
from common.sharding import replicated

_SHARE = 0.5  # of a device's memory that images may take: the state and activations need the rest
_AT_ONCE = 1024  # records read


def images_on_device(source: Source, mesh: Mesh) -> jax.Array:
    """All images of `source`, uint8 [N, H, W, C], a copy on every device of the mesh.

    Raises:
      ValueError: they differ in size, or take more than half of a device's memory.
    """
    first = source[0]["image"]
    limit = device_memory().get("limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = len(source) * first.nbytes
    if needed > _SHARE * limit:
        raise ValueError(
            f"data.on_device=True: {len(source):,} images of {first.nbytes:,} bytes take {needed / 2**30:.1f} GiB, more "
            f"than half of a device's {limit / 2**30:.1f} GiB; set data.on_device=False"
        )
    images = np.empty((len(source), *first.shape), np.uint8)
    for start in range(0, len(source), _AT_ONCE):
        indices = range(start, min(start + _AT_ONCE, len(source)))
        for i, record in zip(indices, read(source, indices), strict=True):
            if record["image"].shape != first.shape:
                raise ValueError(
                    f"data.on_device=True: image 0 has the shape {first.shape} and image {i} {record['image'].shape}, and "
                    "on the device all have one; set data.on_device=False"
                )
            images[i] = record["image"]
        report(source, bad_records(source, indices))
    return jax.make_array_from_callback(images.shape, replicated(mesh), lambda index: images[index])


def drawn_records(source: Source, spec: LoaderSpec, start_step: int = 0) -> Iterator[Batch]:
    """Batches of "record" int32 [b], which of the source's records, and "row" int32 [b], their positions in the endless
    stream, as in `train_batches`. Raises OverflowError after 2**31 rows."""
    held, step = rows_of(spec.batch, spec.held), start_step
    while True:
        rows = step * spec.batch + held
        if rows[-1] >= 2**31:
            raise OverflowError(
                f"step {step} of {spec.batch} rows passes 2**31: data.on_device=False"
            )
        records = np.array(shuffled(rows, len(source), spec.seed), np.int32)
        yield {"record": records, "row": rows.astype(np.int32)}
        step += 1
