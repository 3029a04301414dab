"""Counts agree with arithmetic, and XLA's counts mean what our documentation says they mean."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from common.flops import (
    compiled_flops,
    measure_matmul_peak,
    mfu,
    peak_flops,
    traced_flops,
    transformer_flops,
)

N = 64
A = jnp.ones((N, N))
ONE = 2 * N**3  # a product of two N x N matrices


def power(a, k, unroll=1):
    return jax.lax.scan(lambda x, _: (x @ a, None), a, None, length=k, unroll=unroll)[0]


@pytest.mark.parametrize("stage", [lambda low: low, lambda low: low.compile()])
def test_xla_counts_the_body_of_a_scan_once(stage):
    def count(**kwargs):
        return compiled_flops(stage(jax.jit(lambda a: power(a, 10, **kwargs)).lower(A)))

    assert count() == pytest.approx(ONE, rel=1e-3)
    assert count(unroll=5) == pytest.approx(5 * ONE, rel=1e-3)
    assert count(unroll=True) == pytest.approx(10 * ONE, rel=1e-3)


def test_xla_counts_the_most_expensive_branch():
    f = jax.jit(lambda a: jax.lax.cond(a[0, 0] > 1, lambda a: a @ a @ a, lambda a: a @ a, a))
    assert compiled_flops(f.lower(A).compile()) == pytest.approx(2 * ONE, rel=1e-3)


def test_no_count_is_nan():
    assert jnp.isnan(compiled_flops(types.SimpleNamespace(cost_analysis=lambda: None)))


def test_traced_counts_follow_loops_branches_and_nesting():
    assert traced_flops(lambda a: a @ a, A) == ONE
    assert traced_flops(lambda a: power(a, 10), A) == 10 * ONE
    nested = jax.jit(jax.checkpoint(lambda a: power(power(a, 3), 4)))
    assert traced_flops(nested, jax.ShapeDtypeStruct((N, N), jnp.float32)) == 7 * ONE
    branches = (lambda a: power(a, 3), lambda a: a @ a)
    assert traced_flops(lambda a: jax.lax.cond(a[0, 0] > 1, *branches, a), A) == 3 * ONE


def test_a_backward_pass_costs_twice_the_forward_pass():
    def loss(w, x):
        return (x @ w @ w).sum()

    forward = traced_flops(loss, A, A)
    assert traced_flops(jax.value_and_grad(loss, argnums=(0, 1)), A, A) == 3 * forward


def test_batched_products_and_convolutions():
    q = jnp.ones((2, 3, 5, 8))  # batch, heads, tokens, head width
    assert traced_flops(lambda q: jnp.einsum("bhqd,bhkd->bhqk", q, q), q) == 2 * 6 * 5 * 5 * 8
    images, kernel = jnp.ones((2, 32, 32, 3)), jnp.ones((4, 4, 3, 192))

    def patchify(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert traced_flops(patchify, images, kernel) == 2 * (2 * 64) * (4 * 4 * 3) * 192


def test_a_product_in_an_unbounded_loop_is_an_error():
    def f(a):
        return jax.lax.while_loop(lambda x: x[0, 0] < 5, lambda x: x @ a, a)

    with pytest.raises(ValueError, match="trip count"):
        traced_flops(f, A)
    counter = jax.lax.while_loop(lambda i: i < 3, lambda i: i + 1, 0)
    assert traced_flops(lambda a: a @ a + counter, A) == ONE


def test_shard_map_and_pallas_bodies_are_counted_as_often_as_they_run():
    mesh = AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec("x")
    sharded = jax.shard_map(
        lambda a, b: a @ b, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows,
        axis_names={"x"},
    )  # fmt: skip
    assert traced_flops(sharded, A, A) == ONE

    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    block, whole = pl.BlockSpec((16, N), lambda i: (i, 0)), pl.BlockSpec((N, N), lambda i: (0, 0))
    product = pl.pallas_call(
        kernel, grid=N // 16, in_specs=[block, whole], out_specs=block, out_shape=A, interpret=True
    )
    assert traced_flops(product, A, A) == ONE


@pytest.mark.parametrize("kv_heads, gated, context", [(4, False, None), (2, True, 48)])
def test_the_transformer_formula_counts_a_real_block(kv_heads, gated, context):
    tokens, heads, head, hidden = 16, 4, 8, 96
    width, keys = heads * head, context or tokens

    def block(x, cache, wq, wkv, wo, w_in, w_out):
        q = (x @ wq).reshape(tokens, kv_heads, heads // kv_heads, head)
        kv = jnp.concatenate([cache, (x @ wkv).reshape(tokens, 2, kv_heads, head)])
        scores = jnp.einsum("tkgd,skd->kgts", q, kv[:, 0])
        mixed = jnp.einsum("kgts,skd->tkgd", scores, kv[:, 1]).reshape(tokens, width)
        y = mixed @ wo @ w_in
        return (y[:, :hidden] * y[:, hidden:] if gated else y) @ w_out

    shapes = [
        (tokens, width), (keys - tokens, 2, kv_heads, head), (width, width),
        (width, 2 * kv_heads * head), (width, width), (width, hidden * (1 + gated)),
        (hidden, width),
    ]  # fmt: skip
    counted = traced_flops(block, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    assert counted == transformer_flops(
        tokens, width, 1, hidden, context=context, kv_width=kv_heads * head, gated=gated
    )


def test_vit_b16_is_the_published_17_5_gmacs():
    # DeiT (Touvron et al., 2021) and timm give 17.5 to 17.6 GMACs at 224 px, with the embedding.
    macs = transformer_flops(197, 768, 12, 3072) / 2
    assert macs == pytest.approx(17.45e9, rel=0.01)
    assert transformer_flops(197, 768, 24, 3072) == 4 * macs


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5", 459e12),
        ("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("TPU v6e", 918e12),
        ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA B200", 2250e12),
        ("cpu", None), ("NVIDIA GeForce RTX 4090", None),
    ],
)  # fmt: skip
def test_peaks_by_the_names_devices_report(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak


def test_a_measured_peak_is_a_rate_and_mfu_is_a_fraction_of_it():
    assert measure_matmul_peak(size=128, repeats=2) > 1e6
    assert mfu(8e12, seconds=2.0, n_devices=4, peak=4e12) == 0.25
