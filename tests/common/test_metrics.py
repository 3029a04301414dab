"""Means come out exact however the examples were split, inside jit or out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.metrics import compute, mean, sum_metrics

ROWS = st.lists(st.tuples(st.integers(-1000, 1000), st.sampled_from("ab ")), min_size=8, max_size=8)


def _sum(*parts):
    """The parts' metrics, stacked as a scan would, and added up."""
    return sum_metrics(jax.tree.map(lambda *x: jnp.stack(x), *parts))


@settings(deadline=None)  # the first example compiles
@given(ROWS)
def test_unequal_parts_add_up_to_the_mean_of_the_whole(rows):
    losses = np.array([loss for loss, _ in rows], np.float32)
    a, b = (np.array([part == which for _, part in rows]) for which in "ab")
    merged = compute(_sum({"loss": mean(losses, a)}, {"loss": mean(losses, b)}))
    expected = np.mean(losses[a | b], dtype=np.float64) if (a | b).any() else math.nan
    np.testing.assert_equal(merged["loss"], expected)


def test_padded_rows_do_not_count_even_when_they_hold_nan():
    loss = jnp.array([1.0, 3.0, jnp.nan])
    assert compute({"loss": mean(loss, jnp.array([1, 1, 0]))}) == {"loss": 2.0}


def test_a_nan_of_a_real_row_stays_visible():
    merged = _sum({"loss": mean(jnp.array([1.0, jnp.nan]))}, {"loss": mean(2.0)})
    assert math.isnan(compute(merged)["loss"])
    assert compute({"loss": mean(jnp.array([1.0, jnp.inf]))})["loss"] == math.inf


def test_the_mean_of_nothing_is_nan_without_a_warning():
    assert math.isnan(compute({"loss": mean(jnp.zeros(3), 0)})["loss"])


def test_a_scalar_counts_as_many_examples_as_its_weight():
    assert compute(_sum({"x": mean(1.0, 3)}, {"x": mean(5.0, 1)})) == {"x": 2.0}


def test_microbatches_accumulate_in_a_scan():
    values = jnp.arange(12.0).reshape(3, 4)
    weights = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], jnp.float32)

    @jax.jit
    def accumulated(values, weights):
        def body(_, part):
            return None, {"loss": mean(*part), "ones": mean(1.0, part[1].sum())}

        return sum_metrics(jax.lax.scan(body, None, (values, weights))[1])

    expected = float((values * weights).sum() / weights.sum())
    assert compute(accumulated(values, weights)) == pytest.approx({"loss": expected, "ones": 1.0})


def test_bfloat16_losses_are_summed_in_float32():
    ones = jnp.ones(1000, jnp.bfloat16)  # bfloat16 cannot count beyond 256
    assert mean(ones).sum == 1000 and mean(ones).weight == 1000
