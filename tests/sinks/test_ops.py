"""What is chosen by the machine follows from the devices that a program is built for."""

import jax
import jax.numpy as jnp
import pytest

from common.mesh import MeshSpec, make_mesh
from sinks import cache, ops, stream
from sinks.cache import CacheSpec
from tests.sinks import small


@pytest.fixture
def elsewhere(monkeypatch):
    """JAX's default is another machine than the arrays'."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_the_mesh_in_force_then_the_arrays_then_jaxs_default(elsewhere):
    assert ops.platform() == "gpu"
    assert ops.platform({"a": 1.0, "b": jnp.ones(2)}) == "cpu"
    with jax.set_mesh(make_mesh(MeshSpec())):
        assert ops.platform() == "cpu"
        assert jax.jit(lambda x: x + (ops.platform(x) == "cpu"))(0) == 1
    assert jax.jit(lambda x: x + (ops.platform(x) == "gpu"))(0) == 1, "nothing tells while tracing"


def test_layouts_and_weights_of_another_machine_and_by_hand(elsewhere):
    c = small.config()
    p = small.params(c)
    assert ops.chat_weights() == "float32"
    assert isinstance(cache.init(c, CacheSpec(2, 5)).ring, dict)
    assert isinstance(cache.init(c, CacheSpec(2, 5), stacked=False).ring, tuple)
    assert isinstance(stream.prepare(p)["blocks"], tuple), "as where they lie"
    assert isinstance(stream.prepare(p, stacked=True)["blocks"], dict)
    assert isinstance(jax.eval_shape(stream.prepare, p)["blocks"], dict)
