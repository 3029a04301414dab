"""Monitors where the answer is known, and under changes that must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa import monitors

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=10, deadline=None)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rotation(seed, d):
    return np.linalg.qr(normal(seed, d, d))[0]


def test_stds_of_constant_features_are_zero():
    z_BD = np.tile(normal(0, 1, 8), (32, 1))
    assert float(monitors.pooled_std(z_BD)) == pytest.approx(0, abs=1e-6)
    assert float(monitors.normalized_std(z_BD)) == pytest.approx(0, abs=1e-6)


def test_pooled_std_is_the_mean_of_the_features_own_deviations():
    z_BD = normal(0, 50_000, 3) * np.array([1, 2, 6]) + 10
    assert float(monitors.pooled_std(z_BD)) == pytest.approx(3, rel=0.02)


def test_normalized_std_is_one_over_root_d_on_the_sphere_and_no_larger_elsewhere():
    assert float(monitors.normalized_std(normal(0, 4000, 64))) == pytest.approx(1 / 8, rel=0.01)
    assert float(monitors.normalized_std(normal(0, 4000, 64) ** 2)) < 1 / 8


@given(seeds, st.floats(1e-3, 1e3))
@few
def test_scale_moves_pooled_std_in_proportion_and_normalized_std_not_at_all(seed, scale):
    z_BD = normal(seed, 40, 6)
    np.testing.assert_allclose(
        monitors.pooled_std(scale * z_BD), scale * monitors.pooled_std(z_BD), rtol=1e-4
    )
    per_image = np.random.default_rng(seed).uniform(0.1, scale + 0.1, (40, 1)).astype(np.float32)
    np.testing.assert_allclose(
        monitors.normalized_std(per_image * z_BD), monitors.normalized_std(z_BD), rtol=1e-4
    )


@pytest.mark.parametrize("rows, d", [(300, 40), (30, 40)])
@pytest.mark.parametrize("k", [1, 7, 30])
def test_rankme_counts_equal_directions(rows, d, k):
    z_RD = np.linalg.qr(normal(1, rows, k))[0] @ np.linalg.qr(normal(2, d, k))[0].T
    assert float(monitors.rankme(5 * z_RD)) == pytest.approx(k, rel=1e-3)


def test_rankme_of_spread_singular_values_is_the_exponential_of_their_entropy():
    sigma = np.array([8.0, 4.0, 2.0, 1.0, 1.0])
    p = sigma / sigma.sum()
    z_RD = rotation(0, 5) * sigma @ rotation(1, 5)
    assert float(monitors.rankme(z_RD)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_rankme_of_isotropic_noise_is_nearly_d_and_of_constant_or_zero_features_one():
    assert float(monitors.rankme(normal(0, 5000, 32))) == pytest.approx(32, rel=0.01)
    wide = np.tile(normal(1, 1, 256), (500, 1))  # where float32 noise would show
    assert float(monitors.rankme(wide)) == pytest.approx(1, abs=0.02)
    assert float(monitors.rankme(np.zeros((10, 4)))) == 1


@given(seeds, st.floats(1e-3, 1e3))
@few
def test_rankme_ignores_scale_rotation_and_order_but_not_the_mean(seed, scale):
    z_RD = normal(seed, 60, 9) * np.geomspace(1, 0.05, 9, dtype=np.float32)
    rank = monitors.rankme(z_RD)
    np.testing.assert_allclose(monitors.rankme(scale * z_RD), rank, rtol=1e-3)
    np.testing.assert_allclose(monitors.rankme(z_RD @ rotation(seed, 9)), rank, rtol=1e-3)
    np.testing.assert_allclose(monitors.rankme(z_RD[::-1]), rank, rtol=1e-3)
    assert float(monitors.rankme(z_RD + 100)) < 1.5


def test_token_rankme_tells_tokens_that_only_know_their_place():
    tokens_BND = np.tile(rotation(0, 16), (20, 1, 1))  # 16 places, all images alike
    assert float(monitors.token_rankme(tokens_BND)) == pytest.approx(16, rel=1e-3)
    assert float(monitors.rankme(tokens_BND.mean(1))) == pytest.approx(1, abs=1e-2)


def brute_gap(pred, target, index, valid):
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    gaps = []
    for b, k in zip(*np.nonzero(valid)):
        n, p = index[b, k], pred[b, k]
        others = [cos(p, target[c, n]) for c in range(len(pred)) if c != b]
        gaps.append(cos(p, target[b, n]) - np.mean(others))
    return np.mean(gaps)


@given(seeds, st.sampled_from([(2, 1), (5, 6)]))
@few
def test_gap_equals_comparing_every_pair_of_images(seed, shape):
    B, K = shape
    rng = np.random.default_rng(seed)
    pred, target = normal(seed, B, K, 4), normal(seed + 1, B, 9, 4)
    index = rng.integers(0, 9, (B, K))
    valid = rng.random((B, K)) < 0.7
    valid[0, 0] = True
    got = monitors.cross_sample_gap(pred, target, index, valid)
    np.testing.assert_allclose(got, brute_gap(pred, target, index, valid), atol=1e-5)
    every = monitors.cross_sample_gap(pred, target, index)
    np.testing.assert_allclose(every, brute_gap(pred, target, index, valid | True), atol=1e-5)


def test_gap_of_a_predictor_that_knows_only_the_place_is_zero_and_of_a_perfect_one_is_not():
    B, N, D = 64, 9, 32
    place = normal(0, 1, N, D)
    target = place + normal(1, B, N, D)
    index = np.random.default_rng(0).integers(0, N, (B, 5))
    blind = place[0][index]
    assert abs(float(monitors.cross_sample_gap(blind, target, index))) < 0.02
    perfect = np.take_along_axis(target, index[..., None], 1)
    assert float(monitors.cross_sample_gap(perfect, target, index)) == pytest.approx(0.5, abs=0.05)
    opposite = np.stack([target[0], -target[0]])  # each image's targets are the other's, reversed
    both = np.tile(np.arange(N), (2, 1))
    assert float(monitors.cross_sample_gap(opposite, opposite, both)) == pytest.approx(2, abs=1e-5)


def test_gap_needs_two_images():
    with pytest.raises(ValueError, match="two or more, got 1"):
        monitors.cross_sample_gap(normal(0, 1, 2, 4), normal(1, 1, 9, 4), np.zeros((1, 2), int))


def positions(rows, cols):
    row, col = np.mgrid[:rows, :cols].reshape(2, -1)
    return np.stack([row, col], -1).astype(np.float32)


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 8)])
def test_r2_of_tokens_that_are_their_place_is_one(grid):
    places = positions(*grid) @ normal(0, 2, 16) + 3
    tokens = places + 1e-2 * normal(1, 10, len(places), 16)
    assert float(monitors.token_position_r2(tokens, grid)) == pytest.approx(1, abs=0.01)


def test_r2_of_tokens_without_place_is_about_zero():
    assert abs(float(monitors.token_position_r2(normal(0, 200, 16, 8), (4, 4)))) < 0.02


def test_r2_of_a_known_mixture_of_place_and_noise():
    # A token is the row, of unit variance, plus unit noise: that explains half the row, no column.
    row = positions(4, 4)[:, 0]
    row = (row - row.mean()) / row.std()
    tokens = row[:, None] + normal(0, 3000, 16, 1)
    assert float(monitors.token_position_r2(tokens, (4, 4))) == pytest.approx(0.25, abs=0.01)


def test_r2_is_measured_on_images_it_was_not_fitted_on():
    # More features than tokens of two images: a fit scored on its own rows would reach 1.
    assert float(monitors.token_position_r2(normal(0, 4, 9, 64), (3, 3))) < 0.2


@given(seeds, st.floats(1e-3, 1e3))
@few
def test_r2_ignores_scale_rotation_and_a_common_shift(seed, scale):
    tokens = positions(3, 4) @ normal(seed, 2, 8) + normal(seed + 1, 12, 12, 8)
    r2 = monitors.token_position_r2(tokens, (3, 4))
    changed = scale * (tokens @ rotation(seed, 8) + normal(seed, 8))
    np.testing.assert_allclose(monitors.token_position_r2(changed, (3, 4)), r2, atol=2e-3)


def test_r2_of_collapsed_tokens_is_zero_and_a_wrong_grid_is_named():
    last_bits = 1 + 1e-7 * normal(0, 4, 6, 64)
    for constant in (0, 0.1, 1e4):
        collapsed = (constant * last_bits).astype(np.float32)
        r2 = float(monitors.token_position_r2(collapsed, (2, 3)))
        assert r2 == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="do not fit a 2 x 2 grid"):
        monitors.token_position_r2(normal(0, 4, 6, 5), (2, 2))


def test_report_has_every_monitor_by_name_with_its_own_value():
    tokens, pred = jnp.asarray(normal(0, 12, 6, 5)), jnp.asarray(normal(1, 12, 2, 5))
    index = jnp.tile(jnp.array([1, 4]), (12, 1))
    plain = monitors.report(tokens, (2, 3))
    full = monitors.report(tokens, (2, 3), (pred, tokens, index))
    assert all(type(value) is float for value in full.values())
    assert set(full) - set(plain) == {"cross_sample_gap"}
    pooled = tokens.mean(1)
    expected = {
        "pooled_std": monitors.pooled_std(pooled),
        "normalized_std": monitors.normalized_std(pooled),
        "rankme": monitors.rankme(pooled),
        "token_rankme": monitors.token_rankme(tokens),
        "token_position_r2": monitors.token_position_r2(tokens, (2, 3)),
        "cross_sample_gap": monitors.cross_sample_gap(pred, tokens, index),
    }
    assert full == pytest.approx(jax.tree.map(float, expected), rel=1e-4)


def test_report_takes_bfloat16_tokens():
    tokens = jnp.asarray(normal(0, 12, 6, 5))
    exact, rounded = (monitors.report(x, (2, 3)) for x in (tokens, tokens.astype(jnp.bfloat16)))
    assert rounded == pytest.approx(exact, rel=0.05, abs=0.05)
