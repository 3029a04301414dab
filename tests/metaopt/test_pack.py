"""Packing loses nothing: trees come back, under vmap, in shapes, and with leaves that no vector holds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaopt import hyper, learn
from metaopt.inspect import levels
from metaopt.pack import pack, packed
from tests.metaopt.small import alone

DTYPES = st.sampled_from(["float32", "bfloat16", "int32", "bool"])
SHAPES = st.lists(st.integers(0, 3), max_size=2).map(tuple)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(DTYPES, SHAPES), max_size=6))
def test_any_tree_comes_back(kinds):
    rng = np.random.default_rng(0)
    tree = {f"{i}": jnp.asarray(rng.integers(0, 9, shape), dtype) for i, (dtype, shape) in enumerate(kinds)}  # fmt: skip
    tree = {"some": tree, "none": (), "key": jax.random.key(3)}
    once = pack(tree)
    assert len(once.vectors) == len({dtype for dtype, _ in kinds})
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(*map(plain, (a, b))), once.unpack(), tree
    )
    shapes = jax.eval_shape(lambda: once).unpack()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tree
    )


def plain(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_side_by_side_states_unpack_with_their_axis_in_front():
    make = lambda x: {"a": x, "b": jnp.stack([x, 2 * x]), "n": jnp.zeros((), jnp.int32)}  # noqa: E731
    many = jax.vmap(lambda x: pack(make(x)))(jnp.arange(3.0))
    want = jax.vmap(make)(jnp.arange(3.0))
    jax.tree.map(np.testing.assert_array_equal, many.unpack(), want)


def test_a_packed_optimizer_is_the_optimizer():
    params = {"w": jnp.arange(3.0), "b": jnp.ones(())}
    for tx in (optax.adam(0.1), optax.noisy_sgd(0.1, key=jax.random.key(0)), optax.sgd(0.1)):
        other = packed(tx)
        states = tx.init(params), other.init(params)
        for _ in range(3):
            want, plain_state = alone(tx).update(params, states[0], params)
            got, packed_state = other.update(params, states[1], params)
            states = plain_state, packed_state
            jax.tree.map(np.testing.assert_array_equal, got, want)


def test_levels_of_abstract_and_stacked_towers_have_their_names():
    top = hyper(optax.adam, learning_rate=learn(0.02, scope="leaf"), by=optax.adam(0.01))
    tx = hyper(optax.sgd, learning_rate=learn(0.1), by=top)
    params = {"w": jnp.ones(4)}
    shapes = levels(jax.eval_shape(tx.init, params))
    assert [list(level.raw) for level in shapes] == [["learning_rate"]] * 2
    stacked = jax.vmap(lambda x: tx.init({"w": x}))(jnp.ones((5, 4)))
    for one, many in zip(levels(tx.init(params)), levels(stacked)):
        assert many.values["learning_rate"].shape == (5, *one.values["learning_rate"].shape)
