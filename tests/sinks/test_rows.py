"""Weights as `stream.prepare` lays them out: the same products, and in 8 bits the same but for the weights' rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinks import stream
from sinks.cache import CacheSpec, init
from sinks.models.layers import Rows, dense
from sinks.ops import FEW
from tests.sinks import small

FAMILIES = [
    dict(),
    dict(tie_embeddings=False, attention_bias=True, mlp_bias=True, kv_heads=4),
    dict(family="neox", attention_bias=True, mlp_bias=True, kv_heads=4, rope_fraction=0.5),
    dict(family="mpt", alibi=True, rope_theta=0.0, clip_qkv=0.5, kv_heads=4),
]


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 2 * FEW), st.integers(0, 99), st.floats(-3, 6))
def test_int8_loses_only_the_weights_rounding(tokens, seed, exponent):
    """Whatever the activations' size, and for few tokens as for many (which take another path)."""
    rng = np.random.default_rng(seed)
    w_FD = rng.normal(size=(12, 40)).astype(np.float32)
    x_ND = (10**exponent * rng.standard_cauchy((tokens, 40))).astype(np.float32)
    rows = Rows(jnp.asarray(w_FD)).quantize()
    assert rows.w_FD.dtype == jnp.int8 and int(jnp.abs(rows.w_FD).max()) == 127
    kept_FD = np.asarray(rows.w_FD, np.float64) * np.asarray(rows.scale_F, np.float64)[:, None]
    assert np.all(np.abs(kept_FD - w_FD) <= np.abs(w_FD).max(1, keepdims=True) / 254 * 1.001)

    got_NF = np.asarray(dense(jnp.asarray(x_ND), rows), np.float64)
    want_NF = x_ND.astype(np.float64) @ kept_FD.T
    # 15 bits of an activation for few tokens, bfloat16's 8 for many; errors add up over the 40 inputs.
    step = np.abs(x_ND).max(1) / 127 / 508 if tokens <= FEW else np.abs(x_ND).max(1) / 256
    bound_N = 1.01 * step * np.abs(kept_FD).sum(1).max()
    assert np.all(np.abs(got_NF - want_NF) <= bound_N[:, None])


@pytest.mark.slow
def test_a_zero_token_and_a_zero_weight_row_give_zeros():
    rows = Rows(jnp.zeros((3, 4)).at[1].set(2.0)).quantize()
    y_NF = dense(jnp.zeros((2, 4)).at[1].set(1.0), rows)
    np.testing.assert_allclose(y_NF, [[0, 0, 0], [0, 8, 0]], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, dtype", [*((m, jnp.float32) for m in FAMILIES), (FAMILIES[0], jnp.bfloat16)]
)
def test_joined_products_give_the_same_logits(model, dtype):
    """One token at a time and in a chunk, by tuple and by scan."""
    c = small.config(**model)
    p = small.params(c, dtype)
    tokens, spec, all_logits = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], CacheSpec(2, 4), []
    for laid_out in (p, stream.prepare(p, stacked=False)):
        for cuts in ([[1]] * 10, [[10]]):
            (logits,), _ = small.stream_logits(c, laid_out, spec, [np.array(tokens)], cuts)
            all_logits.append(np.asarray(logits, np.float64))
    joined = {name for block in stream.prepare(p, stacked=False)["blocks"] for name in block}
    assert "q+k+v" in joined and "q" not in joined
    tolerance = 1e-3 if dtype == jnp.float32 else 0.1
    for logits in all_logits[1:]:
        np.testing.assert_allclose(logits, all_logits[0], atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES[::2])
def test_a_model_in_int8_is_the_model_with_rounded_weights(model):
    c = small.config(**model)
    p = stream.prepare(small.params(c), int8=True)
    rounded = jax.tree.map(
        lambda rows: Rows(rows.w_FD * rows.scale_F[:, None], sizes=rows.sizes) if isinstance(rows, Rows) else rows,
        p,
        is_leaf=lambda x: isinstance(x, Rows),
    )  # fmt: skip
    tokens = [np.array([3, 1, 4, 1, 5, 9, 2])]
    (got,), _ = small.stream_logits(c, p, CacheSpec(2, 4), tokens, [[1]] * 7)
    (want,), _ = small.stream_logits(c, rounded, CacheSpec(2, 4), tokens, [[1]] * 7)
    np.testing.assert_allclose(got, want, atol=0.05)


@pytest.mark.slow
def test_int8_holds_a_quarter_of_the_blocks_bytes():
    c = small.config(width=64, mlp_dim=256, head_dim=16)
    p = small.params(c)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(stream.prepare(p, int8=True)["blocks"]) < 0.28 * size(p["blocks"])


def test_prepare_refuses_what_it_cannot_lay_out():
    p = small.params(small.config())
    with pytest.raises(ValueError, match="stacked=True"):
        stream.prepare(p, stacked=True, int8=True)
    with pytest.raises(ValueError, match="as they were loaded"):
        stream.prepare(stream.prepare(p, stacked=False), int8=True)


@pytest.mark.slow
def test_prepared_parameters_can_be_stacked_again():
    c = small.config()
    p = small.params(c)
    back = stream.prepare(stream.prepare(p, stacked=False), stacked=True)
    tokens = [np.array([3, 1, 4, 1, 5])]
    (got,), _ = small.stream_logits(c, back, CacheSpec(1, 3), tokens, [[5]])
    (want,), _ = small.stream_logits(c, p, CacheSpec(1, 3), tokens, [[5]])
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert init(c, CacheSpec(1, 3), stacked=True).ring["k"].shape[0] == c.depth
