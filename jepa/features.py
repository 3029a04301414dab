"""Features of a frozen encoder, averaged over each image's tokens, and which of their labels can be probed.

Legend: I images, D features, B rows of a batch, N tokens, L layers.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Progress = Callable[[str, int, int | None], None]  # what, done, total (None: not known)

_MOST_CLASSES = 1_000_000
_MANY = 1_000  # images that no true label tells apart one by one


class Features(NamedTuple):
    """Pooled features of a split: last f32[I, D], last4 f32[I, 4 D], labels name -> i32[I], -1 for none."""

    last: np.ndarray
    last4: np.ndarray
    labels: dict[str, np.ndarray]


@jax.jit
def _pool(last_BND: jax.Array, last4_LBND: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    mean = functools.partial(jnp.mean, axis=1, dtype=jnp.float32)
    return mean(last_BND), jnp.concatenate([mean(x_BND) for x_BND in last4_LBND], axis=-1)


def extract(
    encode: Callable[[Any], tuple[jax.Array, Sequence[jax.Array]]],
    batches: Iterable[dict[str, Any]],
    *,
    labels: Sequence[str] = ("label",),
    image: str = "image",
    weight: str = "weight",
    to_host: Callable[[Any], np.ndarray] = np.asarray,
    rows: int,
    progress: Progress | None = None,
) -> Features:
    """Runs the encoder over a split and averages its tokens, in float32.

    Args:
      encode: (jitted) images u8[B, height, width, channels] -> last layer [B, N, D], and the last
        four layers as a list or stacked [4, B, N, D].
      batches: dicts that hold `image`, the `labels`, and optionally `weight`: rows of weight 0 are
        padding and are dropped. Images are as the encoder takes them, without augmentation.
      to_host: brings [B, ...] to this process. Where processes hold different rows, pass
        `functools.partial(multihost_utils.process_allgather, tiled=True)`.
      rows: how many images there are at most. Features are written in place: joining them at the end
        would take their memory twice.

    Raises:
      ValueError: there are no batches, or more images than `rows`.
    """
    columns: list[np.ndarray] = []
    filled, in_flight = 0, []

    def collect(pooled, batch):
        nonlocal columns, filled
        real = np.asarray(to_host(batch[weight])) > 0 if weight in batch else slice(None)
        arrays = (*pooled, *(batch[name] for name in labels))
        block = [np.asarray(to_host(array))[real] for array in arrays]
        columns = columns or [np.empty((rows, *x.shape[1:]), x.dtype) for x in block]
        end = filled + len(block[0])
        if end > rows:
            raise ValueError(f"rows={rows}, but there are {end} or more")
        for column, x in zip(columns, block):
            column[filled:end] = x
        filled = end

    for i, batch in enumerate(batches, start=1):
        in_flight.append((_pool(*encode(batch[image])), batch))
        if len(in_flight) > 1:  # fetch one behind, so that the device never waits for the host
            collect(*in_flight.pop(0))
        if progress:
            progress("extract", i, None)
    if not in_flight:
        raise ValueError("extract was given no batches: is the split empty?")
    collect(*in_flight.pop())
    last, last4, *found = (column[:filled] for column in columns)
    return Features(last, last4, {k: v.astype(np.int32) for k, v in zip(labels, found)})


def labelled(features: Features, name: str) -> tuple[Features, np.ndarray]:
    """The images that have a label of this name, with that label i32[I]; not copied where all have."""
    labels = features.labels[name]
    rows = labels >= 0
    if rows.all():
        return features, labels
    of_rows = {key: value[rows] for key, value in features.labels.items()}
    return Features(features.last[rows], features.last4[rows], of_rows), labels[rows]


def probable_labels(
    train: Features, test: Features, least: int = 2
) -> tuple[tuple[str, ...], dict[str, str]]:
    """(the label sets that can be probed, the reason for each other one).

    -1 is no label. Where all training images are of one class, there is nothing to learn. A set of
    values that are different in each of 1,000 training images or more, or that reach a million,
    numbers the images; it is no label set.

    Args:
      least: labelled training images that a probe needs.
    """
    found, others = [], {}
    for name in train.labels:
        known, asked = (x.labels.get(name, np.zeros(0, np.int32)) for x in (train, test))
        known, asked = known[known >= 0], asked[asked >= 0]
        if not len(known) or not len(asked):
            others[name] = f"no {'test' if len(known) else 'training'} image has a label"
        elif len(known) < least:
            others[name] = f"only {len(known)} training images have a label, of {least} or more"
        elif known.min() == known.max():
            others[name] = f"all {len(known):,} training images are of one class ({known[0]})"
        elif (len(known) >= _MANY and len(np.unique(known)) == len(known)) or (
            max(known.max(), asked.max()) >= _MOST_CLASSES
        ):
            others[name] = f"its values, to {known.max():,}, number the images and are no labels"
        else:
            found.append(name)
    return tuple(found), others
