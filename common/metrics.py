"""Metrics as (sum, weight) pairs, so that their means are exact however the examples were split.

The mean of a batch is not the mean of the means of its parts when the parts differ in size, as
microbatches, hosts and a padded last evaluation batch do. Sums and weights add, and division waits
until the end. A step returns `Metrics`, `total` adds up those of its microbatches, and `compute`
divides once, in float64, on the host.

Inside a jitted step over globally sharded arrays `mean` is already the mean over every host.
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A weighted mean that is not divided yet: two scalars, float32 inside a trace."""

    sum: ArrayLike
    weight: ArrayLike


Metrics: TypeAlias = dict[str, Mean]


def mean(value: ArrayLike, weight: ArrayLike = 1.0) -> Mean:
    """The mean over all elements of `value`, each counted `weight` times.

    Args:
      value: array of any shape, e.g. the loss of each example, or a scalar.
      weight: broadcasts against `value`, e.g. a [batch] mask of 0 and 1; a scalar `value` that is
        already the mean of n examples takes weight n.

    An element of weight 0 is absent: whatever it holds, NaN included, cannot reach the sum. Every
    other NaN or infinity does, and stays visible to the end.
    """
    value, weight = jnp.broadcast_arrays(
        jnp.asarray(value, jnp.float32), jnp.asarray(weight, jnp.float32)
    )
    return Mean(jnp.where(weight == 0, 0, value * weight).sum(), weight.sum())


def sum_metrics(stacked: Metrics) -> Metrics:
    """The metrics of all parts, from sums and weights [parts], as `lax.scan` stacks them."""
    return jax.tree.map(lambda x: x.sum(0), stacked)


def compute(metrics: Mapping[str, Mean]) -> dict[str, float]:
    """Fetches the metrics to the host and divides. A mean of nothing (weight 0) is NaN."""
    host = jax.device_get(dict(metrics))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: float(np.float64(m.sum) / np.float64(m.weight)) for name, m in host.items()}
