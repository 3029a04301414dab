"""Every operation's forms agree in value and gradient, and the policy takes the form that fits the devices."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from common.nn import cpu, ops
from common.nn.cpu import rounded
from common.nn.layers import Block
from common.nn.module import define, init_stack, scan_stack
from common.nn.ops import Policy

WIDTH = 32
CPU = Policy("float32", form="cpu")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def agree(plain, other, *args, tolerance=2e-5):
    """Values and gradients of both along one random direction of the result."""
    g = draw(*jax.eval_shape(other, *args).shape, seed=1)

    @partial(jax.jit, static_argnums=0)
    def both(f, *args):
        y, pullback = jax.vjp(f, *args)
        return y, *pullback(g)

    for a, b in zip(both(other, *args), both(plain, *args), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


QUERIES, KEYS = 5, 7
WEIGHTS = (draw(8, 12), draw(12))
OPERATIONS = {
    "dense": (lambda p, x, w, b: ops.dense(p, x, w, b), draw(2, 5, 8), *WEIGHTS),
    "dense without bias": (lambda p, x, w: ops.dense(p, x, w), draw(64, 8), WEIGHTS[0]),
    "qkv": (lambda p, x, *w: jnp.stack(ops.qkv(p, x, w)), draw(2, 5, 8), *WEIGHTS),
    "layer norm": (
        lambda p, *a: ops.layer_norm(p, *a, 1e-6),
        2 * draw(3, 5, 8) + 1,
        draw(8),
        draw(8),
    ),
    "gelu": (ops.gelu, np.linspace(-6, 6, 101, dtype=np.float32)),
    "mlp": (
        lambda p, x, *w: ops.mlp(p, x, w[:2], w[2:]),
        *(draw(2, 5, 8), *WEIGHTS, draw(12, 8), draw(8)),
    ),
    "residual": (ops.residual, draw(2, 5, 8), draw(2, 5, 8, seed=1)),
}


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_forms_are_one_function(name, compute):
    op, *args = OPERATIONS[name]
    plain, other = (lambda *a, p=Policy(compute, form=form): op(p, *a) for form in ("plain", "cpu"))
    # bfloat16 has 8 bits; the plain form rounds the sums of products, too.
    agree(plain, other, *args, tolerance=2e-5 if compute == "float32" else 2e-2)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [None, np.int32([7, 3])])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_formula_in_both_forms(compute, lengths, causal):
    q, k, v = draw(2, QUERIES, 3, 8), draw(2, KEYS, 3, 8, seed=1), draw(2, KEYS, 3, 8, seed=2)

    def formula(q, k, v):
        seen = np.ones((2, QUERIES, KEYS), bool)
        if lengths is not None:
            seen &= np.arange(KEYS) < lengths[:, None, None]
        if causal:
            seen &= np.tri(QUERIES, KEYS, dtype=bool)
        scores = jnp.einsum("bnhk,bmhk->bhnm", q, k, precision="highest") / 8**0.5
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
        return jnp.einsum("bhnm,bmhk->bnhk", weights, v, precision="highest")

    for form in ("plain", "cpu"):
        policy = Policy(compute, form=form)
        agree(
            formula,
            lambda q, k, v, p=policy: ops.attention(p, q, k, v, lengths, causal),
            *(q, k, v),
            tolerance=2e-5 if compute == "float32" else 3e-2,
        )


@pytest.mark.parametrize("at_once", [1, 2, 6, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_mean_over_examples_is_the_same_in_groups(at_once, weighted):
    params, x, given = draw(8, 8), draw(6, 3, 8), draw(6, 3, 8, seed=1)
    weight = np.random.default_rng(0).random((6, 3)) < 0.6 if weighted else None

    def mean(policy):
        def errors(params, x, given):
            return ((x @ params - given) ** 2).mean(-1)

        return lambda params, x: ops.mean_over_examples(policy, errors, params, x, given, weight)

    agree(mean(Policy(form="plain")), mean(Policy(form="cpu", at_once=at_once)), params, x)
    got = ops.each_example(Policy(form="cpu", at_once=at_once), lambda x, y: x * y, x, given)
    np.testing.assert_array_equal(got, x * given)


def test_the_form_follows_from_the_meshs_devices():
    def mesh(platform, size=1):
        devices = np.array([SimpleNamespace(platform=platform)] * size)
        return SimpleNamespace(devices=devices, size=size)

    assert Policy().built_for(mesh("cpu")).form == "cpu"
    assert Policy().built_for(mesh("cpu", 8)).form == "plain"
    assert Policy().built_for(mesh("tpu", 8)).form == "plain"
    assert (
        Policy().built_for(mesh("gpu")).form == Policy().built_for(mesh("cuda", 8)).form == "cudnn"
    )
    assert Policy(form="plain").built_for(mesh("cpu")).form == "plain"
    fitted = Policy().built_for(mesh("cpu"), widest=1 << 20)
    assert Policy(form="cpu").built_for(mesh("cpu"), widest=1 << 20) == fitted
    assert fitted.at_once == 2 and fitted.blocks_per_turn(12) == 12
    assert Policy().built_for(mesh("tpu")).blocks_per_turn(12) == 1
    with pytest.raises(ValueError, match=r"policy\.form='gpu'"):
        Policy(form="gpu")
    for form, devices in (("cudnn", mesh("tpu")), ("cpu", mesh("cpu", 8)), ("cpu", mesh("gpu"))):
        with pytest.raises(ValueError, match=f"policy.form='{form}' does not run on a mesh of"):
            Policy(form=form).built_for(devices)


@pytest.mark.parametrize(
    ("shape", "calls"),
    [
        ((2, 256, 2, 64), True),
        ((2, 254, 2, 64), False),
        ((2, 257, 2, 64), False),  # JAX refuses its gradient
        ((2, 256, 2, 20), False),
    ],
)
def test_cudnn_is_asked_from_256_keys(shape, calls, monkeypatch):
    asked = []

    def spy(q, *_, implementation, **__):
        asked.append(implementation)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    q = jnp.zeros(shape)
    for compute in ("bfloat16", "float32"):
        ops.attention(Policy(compute, form="cudnn"), q, q, q)
    assert asked == ["cudnn" if calls else "xla", "xla"]


BFLOAT16 = partial(cpu.dense, "bfloat16")


@pytest.mark.parametrize("shape", [(192, 8, 24), (192, 24, 8), (64, 8, 8), (5, 16, 16)])
def test_weight_gradients_sum_over_rows(shape):
    n, d, f = shape
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=s).astype(jnp.bfloat16) for s in ((n, d), (d, f), (n, f)))
    _, pullback = jax.vjp(BFLOAT16, x.astype(np.float32), w.astype(np.float32), None)
    dx, dw, _ = jax.jit(pullback)(g.astype(np.float32))
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
    y, pullback = jax.vjp(BFLOAT16, x, w, b)
    operand = [a.astype(jnp.bfloat16).astype(np.float64) for a in (x, w, g)]
    np.testing.assert_allclose(y, operand[0] @ operand[1] + b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pullback(g)[2], operand[2].sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_a_token_of_one_value_is_normalised_to_the_bias():
    """Also where the two sums' rounding says that its variance is negative."""
    x = np.geomspace(1e-3, 1e3, 500, dtype=np.float32)[:, None] * np.ones((1, 192), np.float32)
    y = jax.jit(lambda x: cpu.layer_norm(1e-6, x, jnp.ones(192), jnp.ones(192)))(x)
    np.testing.assert_allclose(y, 1, atol=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("block", [2 * WIDTH * 4 * WIDTH, 2 * WIDTH * 2 * WIDTH, 2 * WIDTH * WIDTH])
def test_a_block_in_parts_is_the_block(monkeypatch, block):
    """Also in parts, values and gradients are those of whole products, and no product takes more columns than asked."""
    whole = define(lambda rngs: Block(WIDTH, 2, 4 * WIDTH, CPU, rngs))
    params, unravel = ravel_pytree(whole.init(jax.random.key(0)))
    x_BND = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 1 << 30)

    def in_parts(params, x):
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "BLOCK_BYTES", block)
            return whole(unravel(params), x)

    agree(lambda params, x: whole(unravel(params), x), in_parts, params, x_BND)
    widest = max(
        int(w) for w in re.findall(r"f32\[10,(\d+)\]", str(jax.make_jaxpr(in_parts)(params, x_BND)))
    )
    assert widest == block // (2 * WIDTH)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [2, np.array([[4, 0, 4], [1, 2, 3]])])
def test_a_block_computes_only_the_wanted_tokens(wanted):
    """Some from the end, or by index, also twice: their values, and gradients that reach all that they attend to."""
    block = define(lambda rngs: Block(WIDTH, 2, 4 * WIDTH, CPU, rngs))
    x_BND = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
    rows = np.arange(2)[:, None]
    index = np.array([[3, 4]] * 2) if isinstance(wanted, int) else wanted
    params = block.init(jax.random.key(0))
    agree(
        lambda x: block(params, x)[rows, index],
        lambda x: block(params, x, wanted=wanted),
        np.asarray(x_BND),
    )
    products = str(jax.make_jaxpr(lambda x: block(params, x, wanted=wanted))(x_BND))
    assert f"f32[{2 * index.shape[1]},{4 * WIDTH}]" in products  # the MLP's hidden layer
    assert f"f32[10,{4 * WIDTH}]" not in products


def gradient(depth: int):
    """The gradient of a stack of blocks as training compiles it, and its arguments."""
    policy = Policy(form="cpu")
    block = define(lambda rngs: Block(WIDTH, 2, 4 * WIDTH, policy, rngs))
    stacked = init_stack(block, depth, jax.random.key(0))
    x_BND = jax.random.normal(jax.random.key(1), (4, 6, WIDTH))

    def loss(stacked, x):
        return (scan_stack(block, stacked, x, unroll=depth) ** 2).mean()

    return jax.jit(jax.grad(loss), compiler_options=cpu.COMPILER_OPTIONS), (stacked, x_BND)


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
