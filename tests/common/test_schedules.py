"""Schedules reach exactly what was asked for, at the updates where the released code does (docs/papers/ijepa.md 1.6)."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.schedules import cosine, linear, warmup_cosine

START, PEAK, FINAL = 2e-4, 1e-3, 1e-6


def released_learning_rate(update, warmup, total):
    """The released rule for the first update, 1, and on: the count is raised before it is read."""
    if update < warmup:
        return START + (PEAK - START) * update / warmup
    progress = (update - warmup) / (total - warmup)
    return FINAL + (PEAK - FINAL) * (1 + np.cos(np.pi * progress)) / 2


@settings(deadline=None)
@given(st.data(), st.integers(2, 10_000))
def test_learning_rate_follows_the_released_rule(data, total):
    warmup = data.draw(st.integers(0, total - 1))
    count = data.draw(st.integers(0, total - 1))
    got = float(warmup_cosine(START, PEAK, FINAL, warmup, total)(count))
    want = released_learning_rate(count + 1, warmup, total)
    assert got == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_learning_rate_at_its_ends():
    schedule = warmup_cosine(START, PEAK, FINAL, warmup=10, total=100)
    assert float(schedule(0)) == pytest.approx(START + (PEAK - START) / 10)  # 1 / warmup, not start
    assert float(schedule(9)) == np.float32(PEAK)
    assert float(schedule(99)) == float(schedule(500)) == np.float32(FINAL)


def test_no_warmup_starts_below_the_peak_and_all_warmup_ends_at_it():
    assert FINAL < float(warmup_cosine(START, PEAK, FINAL, 0, 10)(0)) < PEAK
    assert float(warmup_cosine(START, PEAK, FINAL, 10, 10)(9)) == np.float32(PEAK)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup of 11 steps does not fit into 10"):
        warmup_cosine(START, PEAK, FINAL, 11, 10)


def test_weight_decay_is_a_cosine_not_a_line():
    schedule = cosine(0.04, 0.4, 100)
    assert float(schedule(24)) == pytest.approx(0.4 - 0.36 * (1 + np.cos(np.pi / 4)) / 2)
    assert float(schedule(49)) == pytest.approx(0.22)
    assert float(schedule(99)) == float(schedule(500)) == np.float32(0.4)


def test_a_line_starts_exactly_at_its_start():
    schedule = linear(0.996, 1.0, 100)
    assert float(schedule(0)) == np.float32(0.996)
    assert float(schedule(50)) == pytest.approx(0.998)
    assert float(schedule(100)) == float(schedule(500)) == 1.0


@pytest.mark.parametrize(
    "schedule", [warmup_cosine(START, PEAK, FINAL, 3, 9), cosine(0.04, 0.4, 9), linear(0.9, 1, 9)]
)
def test_a_traced_count_gives_what_a_python_int_gives(schedule):
    counts = np.arange(12)
    traced = jax.jit(jax.vmap(schedule))(counts)
    assert traced.dtype == np.float32
    np.testing.assert_allclose(traced, [schedule(int(c)) for c in counts], rtol=1e-6)
