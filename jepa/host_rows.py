"""Features too large for a device: they stay on the host, and rows are standardised on their way.

Legend: I images, D features, R rows of a chunk.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

_dot = functools.partial(jnp.dot, precision="highest")  # TPU and GPU round float32 otherwise
_DEAD = 1e-6  # deviation, of the mean, below which a feature is constant but for rounding


@dataclass(frozen=True)
class HostRows:
    """f32[I, D] on the host. `take` gives rows ((x - mean) * scale) @ axes on the device.

    Attributes:
      chunk: rows that are on the device at a time.
      axes_DD: the principal axes; None leaves features as they are.
    """

    features_ID: np.ndarray
    mean_D: np.ndarray
    scale_D: np.ndarray
    axes_DD: jax.Array | None
    chunk: int

    def __len__(self) -> int:
        return len(self.features_ID)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.features_ID.shape

    def take(self, rows_R: np.ndarray | slice) -> jax.Array:
        """f32[R, D] on the device."""
        return _to_axes(self.features_ID[rows_R], self.mean_D, self.scale_D, self.axes_DD)

    def like(self, features_ID: np.ndarray) -> "HostRows":
        """Other features by the same moments and axes."""
        return HostRows(features_ID, self.mean_D, self.scale_D, self.axes_DD, self.chunk)


@jax.jit
def _to_axes(x_RD, mean_D, scale_D, axes_DD):
    x_RD = (jnp.asarray(x_RD, jnp.float32) - mean_D[None]) * scale_D[None]
    return x_RD if axes_DD is None else _dot(x_RD, axes_DD)


@jax.jit
def _add_products(sum_DD, x_RD):
    return sum_DD + _dot(x_RD.T, x_RD)


def host_rows(
    features_ID: np.ndarray, standardize: bool, rotate: bool, chunk_bytes: int
) -> HostRows:
    """Takes the moments and principal axes of features in passes over chunks of at most `chunk_bytes`."""
    count, D = features_ID.shape
    chunk = max(1, chunk_bytes // (4 * D))
    mean_D, scale_D = np.zeros(D), np.ones(D)
    if standardize:
        mean_D = sum(x.sum(0, dtype=np.float64) for x in _chunks(features_ID, chunk)) / count
        square_D = sum(np.square(x - mean_D).sum(0) for x in _chunks(features_ID, chunk)) / count
        std_D = np.sqrt(square_D)
        alive_D = std_D > _DEAD * np.abs(mean_D)
        scale_D = np.where(alive_D, 1 / np.where(alive_D, std_D, 1), 0)
    mean_D, scale_D = np.asarray(mean_D, np.float32), np.asarray(scale_D, np.float32)
    rows = HostRows(features_ID, mean_D, scale_D, None, chunk)
    if not rotate:
        return rows
    sum_DD = jnp.zeros((D, D), jnp.float32)
    for start in range(0, count, chunk):
        sum_DD = _add_products(sum_DD, rows.take(slice(start, start + chunk)))
    _, axes_DD = jnp.linalg.eigh(sum_DD / count)
    return HostRows(features_ID, mean_D, scale_D, axes_DD, chunk)


def _chunks(features_ID: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    return (features_ID[i : i + chunk] for i in range(0, len(features_ID), chunk))
