"""The precision-and-layout policy: what XLA makes of it on CPU, and that it changes no numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from common.nn import cpu
from common.nn.attention import attention
from common.nn.cpu import compiler_options, fenced_gradient, rounded
from common.nn.layers import Block, gelu, layer_norm
from common.nn.module import define, init_stack, scan_stack
from common.nn.policy import Policy

WIDTH = 32


@pytest.mark.parametrize("shape", [(192, 8, 24), (192, 24, 8), (64, 8, 8), (5, 16, 16)])
def test_weight_gradients_sum_over_rows(shape):
    n, d, f = shape
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=s).astype(jnp.bfloat16) for s in ((n, d), (d, f), (n, f)))
    _, pullback = jax.vjp(Policy().dense, x.astype(np.float32), w.astype(np.float32))
    dx, dw = jax.jit(pullback)(g.astype(np.float32))
    x, w, g = (a.astype(np.float64) for a in (x, w, g))
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, x.T @ g, rtol=1e-5, atol=1e-5)


def test_rounding_by_bits_is_the_cast():
    """Every number of 16 bits with every low half that decides: below, at and above a tie, and the ends."""
    high = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    x = (high | np.uint32([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).view(np.float32)
    x = x[~np.isnan(x)]
    got, want = jax.jit(lambda x: rounded(x, "bfloat16"))(x), x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint16), want.view(np.uint16))
    # The NaNs that arithmetic makes.
    assert np.isnan(
        np.asarray(rounded(np.float32([np.nan, -np.nan, np.inf * 0]), "bfloat16"))
    ).all()


def test_rounding_passes_the_gradient_on():
    slope = jax.grad(lambda x: (rounded(x, "bfloat16") * jnp.bfloat16(3)).astype(jnp.float32).sum())
    assert slope(jnp.arange(3.0)).tolist() == [3.0, 3.0, 3.0]


def test_a_bias_takes_the_sum_of_what_the_products_take():
    rng = np.random.default_rng(0)
    x, w, b = (rng.normal(size=s).astype(np.float32) for s in ((3, 5, 8), (8, 4), (4,)))
    g = rng.normal(size=(3, 5, 4)).astype(np.float32)
    y, pullback = jax.vjp(Policy().dense, x, w, b)
    operand = [a.astype(jnp.bfloat16).astype(np.float64) for a in (x, w, g)]
    np.testing.assert_allclose(y, operand[0] @ operand[1] + b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pullback(g)[2], operand[2].sum((0, 1)), rtol=1e-5, atol=1e-5)


def autodiff(plain, ours, *args):
    """Values and gradients of both along one random direction of the result."""
    y, pullback = jax.vjp(ours, *args)
    want, derived = jax.vjp(plain, *args)
    g = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    for a, b in zip((y, *pullback(g)), (want, *derived(g)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_written_gradients_are_the_derived_ones():
    """Against what jax derives from the plain formula."""
    rng = np.random.default_rng(0)
    x = 2 * rng.normal(size=(3, 5, 8)).astype(np.float32) + 1
    scale, bias = rng.normal(size=(2, 8)).astype(np.float32)

    def plain_norm(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt(centred.var(-1, keepdims=True) + 1e-6) * scale + bias

    autodiff(plain_norm, lambda *args: layer_norm(1e-6, *args), x, scale, bias)
    autodiff(lambda x: jax.nn.gelu(x, approximate=False), gelu, np.linspace(-6, 6, 101, dtype="f4"))


def test_a_token_of_one_value_is_normalised_to_the_bias():
    """Also where the two sums' rounding says that its variance is negative."""
    x = np.geomspace(1e-3, 1e3, 500, dtype=np.float32)[:, None] * np.ones((1, 192), np.float32)
    y = jax.jit(lambda x: layer_norm(1e-6, x, jnp.ones(192), jnp.ones(192)))(x)
    np.testing.assert_allclose(y, 1, atol=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 3, 5])
@pytest.mark.parametrize("masked", [None, "keys", "causal"])
def test_attention_is_the_plain_formula(queries, masked):
    rng = np.random.default_rng(0)
    B, N, H, K = 2, 5, 3, 4
    q, k, v = (rng.normal(size=(B, n, H, K)).astype(np.float32) for n in (queries, N, N))
    valid = {
        None: None,
        "keys": rng.random((B, N)) < 0.7,
        "causal": np.tril(np.ones((1, N, N), bool))[:, -queries:],
    }[masked]

    def plain(q, k, v):
        scores = jnp.einsum("bnhk,bmhk->bhnm", q, k) / K**0.5
        if valid is not None:
            seen = valid[:, None, None] if valid.ndim == 2 else valid[:, None]
            scores = jnp.where(seen, scores, -1e30)
        return jnp.einsum("bhnm,bmhk->bnhk", jax.nn.softmax(scores), v)

    autodiff(plain, lambda q, k, v: attention("float32", q, k, v, valid), q, k, v)


@pytest.mark.slow
@pytest.mark.parametrize("block", [2 * WIDTH * 4 * WIDTH, 2 * WIDTH * 2 * WIDTH, 2 * WIDTH * WIDTH])
def test_a_block_in_parts_is_the_block(monkeypatch, block):
    """Also in parts, values and gradients are those of whole products, and no product takes more columns than asked."""
    whole = define(lambda rngs: Block(WIDTH, 2, 4 * WIDTH, Policy("float32"), rngs))
    params, unravel = ravel_pytree(whole.init(jax.random.key(0)))
    x_BND = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 1 << 30)

    def in_parts(params, x):
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "BLOCK_BYTES", block)
            return whole(unravel(params), x)

    autodiff(lambda params, x: whole(unravel(params), x), in_parts, params, x_BND)
    widest = max(
        int(w) for w in re.findall(r"f32\[10,(\d+)\]", str(jax.make_jaxpr(in_parts)(params, x_BND)))
    )
    assert widest == block // (2 * WIDTH)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [2, np.array([[4, 0, 4], [1, 2, 3]])])
def test_a_block_computes_only_the_wanted_tokens(wanted):
    """Some from the end, or by index, also twice: their values, and gradients that reach all that they attend to."""
    block = define(lambda rngs: Block(WIDTH, 2, 4 * WIDTH, Policy("float32"), rngs))
    x_BND = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
    rows = np.arange(2)[:, None]
    index = np.array([[3, 4]] * 2) if isinstance(wanted, int) else wanted
    params = block.init(jax.random.key(0))
    autodiff(
        lambda x: block(params, x)[rows, index],
        lambda x: block(params, x, wanted=wanted),
        np.asarray(x_BND),
    )
    products = str(jax.make_jaxpr(lambda x: block(params, x, wanted=wanted))(x_BND))
    assert f"f32[{2 * index.shape[1]},{4 * WIDTH}]" in products  # the MLP's hidden layer
    assert f"f32[10,{4 * WIDTH}]" not in products


def gradient(depth: int):
    """The gradient of a stack of blocks as training compiles it, and its arguments."""
    policy = Policy()
    block = define(lambda rngs: Block(WIDTH, 2, 4 * WIDTH, policy, rngs))
    stacked = init_stack(block, depth, jax.random.key(0))
    x_BND = jax.random.normal(jax.random.key(1), (4, 6, WIDTH))

    def loss(stacked, x):
        return (scan_stack(block, stacked, x, unroll=depth) ** 2).mean()

    return jax.jit(jax.grad(loss), compiler_options=compiler_options()), (stacked, x_BND)


@pytest.mark.slow
def test_the_residual_streams_gradient_is_summed_once():
    def operands(depth: int) -> int:
        """The most that a fusion takes which makes something of the stream's shape."""
        step, args = gradient(depth)
        text = step.lower(*args).compile().as_text()
        found = re.findall(rf"= \w+\[(?:4,6|24),{WIDTH}\]\S* fusion\(([^)]*)\)", text)
        return max(operand.count("%") for operand in found)

    # Summed again in every block, they would grow by some seven a block.
    assert operands(6) == operands(3)


def test_a_mesh_says_what_a_program_is_built_for():
    """Compiled on a CPU for one chip of a TPU, a program is the TPU's."""

    def built_for(kind):
        device = jax.sharding.AbstractDevice(kind, None, kind)
        return jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)

    def program():
        double = lambda x: cpu.in_groups(lambda x: 2 * x, x, cpu.CACHE_BYTES // 8)  # noqa: E731
        return str(jax.make_jaxpr(double)(jax.ShapeDtypeStruct((64, 4), jnp.float32)))

    assert cpu.column_parts(192, 768) == 3 and "scan" in program()  # on this CPU, without a mesh
    with jax.sharding.use_abstract_mesh(built_for("cpu")):
        assert cpu.column_parts(192, 768) == 3 and "scan" in program()
    with jax.sharding.use_abstract_mesh(built_for("tpu")):
        assert cpu.column_parts(192, 768) == 1 and "scan" not in program()


def test_a_fenced_gradient_is_the_gradient():
    x = jnp.arange(3.0)
    assert jax.grad(lambda x: (fenced_gradient(x) ** 2).sum())(x).tolist() == [0.0, 2.0, 4.0]
