"""The precision-and-layout policy: what XLA makes of it on CPU, and that it changes no numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.nn.layers import Block
from common.nn.module import define, init_stack, scan_stack
from common.nn.policy import Policy, compiler_options, computed_once

WIDTH = 32


@pytest.mark.parametrize("shape", [(64, 8, 24), (64, 24, 8), (5, 16, 16)])
def test_weight_gradients_sum_over_rows(shape):
    n, d, f = shape
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=s).astype(jnp.bfloat16) for s in ((n, d), (d, f), (n, f)))
    _, pullback = jax.vjp(Policy().dense, x.astype(np.float32), w.astype(np.float32))
    dx, dw = jax.jit(pullback)(g.astype(np.float32))
    x, w, g = (a.astype(np.float64) for a in (x, w, g))
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, x.T @ g, rtol=1e-5, atol=1e-5)


def gradient(depth: int):
    """The gradient of a stack of blocks as training compiles it, and its arguments."""
    policy = Policy()
    block = define(lambda rngs: Block(WIDTH, 2, 4 * WIDTH, policy, rngs))
    stacked = init_stack(block, depth, jax.random.key(0))
    x_BND = jax.random.normal(jax.random.key(1), (4, 6, WIDTH))

    def loss(stacked, x):
        return (scan_stack(block, stacked, x, unroll=depth) ** 2).mean()

    return jax.jit(jax.grad(loss), compiler_options=compiler_options()), (stacked, x_BND)


def test_the_residual_streams_gradient_is_summed_once():
    def operands(depth: int) -> int:
        """The most that a fusion takes which makes something of the stream's shape."""
        step, args = gradient(depth)
        text = step.lower(*args).compile().as_text()
        found = re.findall(rf"= \w+\[(?:4,6|24),{WIDTH}\]\S* fusion\(([^)]*)\)", text)
        return max(operand.count("%") for operand in found)

    # Summed anew in every block, they would grow by some seven a block.
    assert operands(6) == operands(3)


def test_computed_once_is_the_identity():
    x = jnp.arange(3.0)
    assert jax.grad(lambda x: (computed_once(x) ** 2).sum())(x).tolist() == [0.0, 2.0, 4.0]
