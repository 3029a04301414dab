"""Counts agree with arithmetic, and utilisation is their part of the peak."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from common.flops import measure_matmul_peak, peak_flops, traced_flops, utilisation

N = 64
A = jnp.ones((N, N))
ONE = 2 * N**3  # a product of two N x N matrices


def power(a, k, unroll=1):
    return jax.lax.scan(lambda x, _: (x @ a, None), a, None, length=k, unroll=unroll)[0]


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


def test_a_measured_peak_is_a_rate():
    assert measure_matmul_peak(size=128, repeats=2) > 1e6


def test_utilisation_is_a_part_of_all_chips_peak_and_says_when_work_is_counted_twice():
    chips = [types.SimpleNamespace(device_kind="TPU v4")] * 2

    def used(f, seconds=1e-9):
        return utilisation(jax.make_jaxpr(f)(A).jaxpr, chips, seconds)

    def loss(a):
        return jnp.sin(a @ a).sum()

    assert used(lambda a: a @ a) == {"mfu": pytest.approx(ONE / (1e-9 * 2 * 275e12))}
    assert list(used(jax.grad(jax.jit(loss)))) == ["mfu"]
    assert list(used(jax.jit(jax.grad(jax.checkpoint(loss))))) == ["hfu"]
    assert used(lambda a: jax.lax.while_loop(lambda x: x[0, 0] < 5, lambda x: x @ a, a)) == {}
    cpu = types.SimpleNamespace(device_kind="cpu")
    assert utilisation(jax.make_jaxpr(lambda a: a @ a)(A).jaxpr, [cpu], 1.0) == {}


def test_fused_attention_counts_as_its_formula(monkeypatch):
    """cuDNN's, which a machine without it cannot run but can trace."""
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    q, k = (jnp.ones((2, n, 3, 64), jnp.bfloat16) for n in (256, 512))

    def flops(implementation):
        def loss(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, implementation=implementation).sum()

        return traced_flops(loss, q, k, k), traced_flops(jax.grad(loss, (0, 1, 2)), q, k, k)

    assert flops("cudnn") == flops("xla")
