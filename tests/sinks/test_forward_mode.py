"""Directional derivatives: forward mode goes through the models and the training loss, and reverse mode agrees with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinks import stream
from sinks.cache import CacheSpec
from sinks.ops import times
from sinks.recipe import variant
from tests.sinks import small

NEOX = dict(
    family="neox", kv_heads=4, attention_bias=True, mlp_bias=True, rope_fraction=0.5,
    parallel_residual=True, tie_embeddings=False,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 9))


def direction(params):
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return treedef.unflatten([jnp.asarray(rng.normal(size=p.shape), p.dtype) for p in leaves])


@pytest.mark.slow
@pytest.mark.parametrize("model", [dict(sink_logits="learned"), NEOX], ids=["llama", "neox"])
def test_derivatives_of_logits_are_those_of_finite_differences(model):
    """jvp and linearize in float64, for a text longer than the cache."""
    with jax.enable_x64(True):
        c, spec = small.config(**model), CacheSpec(2, 4, dtype="float64")
        p = small.params(c, jnp.float64)

        @jax.jit
        def logits(p):
            return stream.unembed(c, p, stream.hidden_from_start(c, p, spec, TOKENS))

        @jax.jit
        def along(p, u):
            return *jax.jvp(logits, (p,), (u,)), jax.linearize(logits, p)[1](u)

        u, step = direction(p), 1e-7
        at = lambda s: logits(jax.tree.map(lambda x, y: x + s * y, p, u))  # noqa: E731
        want = (at(step) - at(-step)) / (2 * step)
        y, *both = along(p, u)
        np.testing.assert_allclose(y, logits(p), rtol=0, atol=1e-12)
        for got in both:
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("compute, within", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_forward_and_reverse_mode_agree_on_the_training_loss(compute, within):
    """Along the gradient, the loss rises by the gradient's square."""
    recipe = variant("logit", small.config(), tx=None, compute=compute)
    loss = lambda p: recipe.loss(p, {}, {"tokens": TOKENS}, None)[0]  # noqa: E731

    @jax.jit
    def both(p):
        gradient = jax.grad(loss)(p)
        return jax.jvp(loss, (p,), (gradient,))[1], gradient

    forward, gradient = both(small.params(recipe.model))
    reverse = sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient))
    assert jnp.abs(gradient["blocks"]["sink_logit"]).max() > 1e-3
    np.testing.assert_allclose(forward, reverse, rtol=within)


def test_a_bfloat16_product_sums_in_float32_and_derives_in_bfloat16():
    """No product of the backward pass has a float32 operand; what it gives back is of its inputs' types."""
    x_ND, w_DF = jnp.ones((1, 257)), jnp.ones((257, 3), jnp.bfloat16)
    y, pull = jax.vjp(times, x_ND, w_DF)
    assert y.dtype == jnp.float32 and (y == 257).all(), "bfloat16 has no 257"
    dx, dw = pull(jnp.full((1, 3), 1.001))
    assert (dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16)
    assert (dx == 3).all() and (dw == 1).all()
    text = str(jax.make_jaxpr(pull)(y))
    assert text.count("dot_general") == 2 and "preferred_element_type=float32" not in text
