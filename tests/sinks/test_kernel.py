"""The TPU kernel, interpreted here, gives what the XLA path gives; and it compiles for a TPU where libtpu is installed."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.mesh import MeshSpec, make_mesh
from sinks import attention
from sinks.cache import CacheSpec
from sinks.params import param_shardings
from tests.sinks import small


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU's branch, taken on this machine: the rows and key heads of each call."""
    real, calls = attention.kernel.mix, set()

    def mix(*args, **kw):
        calls.add(args[0].shape[:2])
        return real(*args, **kw, interpret=True)

    monkeypatch.setattr(attention.kernel, "mix", mix)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *, tpu, default: tpu())
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, spec",
    [
        (dict(), CacheSpec(4, 5)),
        (dict(), CacheSpec(4, 5, int8=True)),
        (dict(kv_heads=1, sink_logits="learned"), CacheSpec(0, 7)),
        (dict(alibi=True, rope_theta=0.0, sink_logits="zero"), CacheSpec(2, 150)),
        (dict(alibi=True, rope_theta=0.0, sink_logits="zero"), CacheSpec(2, 150, int8=True)),
        (dict(kv_heads=4, rope_fraction=0.5), CacheSpec(1, 3)),
    ],
)
def test_the_kernel_gives_what_xla_gives(model, spec, request):
    c = small.config(**model)
    p = small.params(c)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, c.vocab_size, n) for n in (19, 30)]
    cuts = [(1, 1), (1, 1), (0, 12), (12, 9), (1, 1), (4, 6)]
    want, _ = small.stream_logits(c, p, spec, rows, cuts, pad=12)
    request.getfixturevalue("interpreted")
    # Another name for the same model: the programs above are not to be used again.
    other = small.config(**model, bos_id=3)
    got, _ = small.stream_logits(other, p, spec, rows, cuts, pad=12)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
def test_on_a_mesh_each_device_does_its_own_rows_and_heads(int8, request):
    c, spec = small.config(vocab_size=16), CacheSpec(2, 5, int8=int8)
    p = small.params(c)
    rows = [np.random.default_rng(b).integers(0, 16, 9 + b) for b in range(4)]
    cuts = [[4] * 4, [4] * 4, [1] * 4]
    want, _ = small.stream_logits(c, p, spec, rows, cuts)
    calls = request.getfixturevalue("interpreted")
    mesh = make_mesh(MeshSpec(replica=2, fsdp=2, tensor=2))
    p = jax.device_put(p, param_shardings(c, mesh))
    other = small.config(vocab_size=16, bos_id=3)
    with jax.set_mesh(mesh):
        got, _ = small.stream_logits(other, p, spec, rows, cuts)
    assert calls == {(1, 1)}, "rows over 4, key heads over 2"
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_several_blocks_of_rows_and_keys(interpreted, monkeypatch):
    """A chunk of 70 tokens over 300: blocks that nobody sees are skipped, and none that somebody does."""
    monkeypatch.setattr(attention.kernel, "ROWS", 16)
    monkeypatch.setattr(attention.kernel, "KEYS", 128)
    rng = np.random.default_rng(0)
    B, G, Q, T, K, M, S, R = 1, 2, 2, 70, 8, 300, 3, 230
    q = jnp.asarray(rng.normal(size=(2, B, G, Q, T, K)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, B, G, M, K)), jnp.float32)
    sinks = attention.Keys(k[:, :, :S], v[:, :, :S], jnp.arange(S)[None])
    t = 400 + jnp.arange(T)[None]
    recent = attention.Keys(k, v, (400 + T - M) + jnp.arange(M)[None])
    plan = attention.Plan(None, None, t, t - S - R, None, None)
    bias = attention.Bias(jnp.array([0.1, 0.2, 0.3, 0.4]), jnp.array([0.0, 1.0, -1.0, 2.0]))
    want = attention._softmax_mix([(q[0], sinks), (q[1], recent)], t, plan.evicted, S, bias)
    got = attention._kernel(q[0], q[1], sinks, recent, plan, S, bias)
    np.testing.assert_allclose(got, want, atol=1e-5)


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from common.mesh import MeshSpec, make_mesh
from common.sharding import batch_sharding
from sinks import cache, params, stream
from sinks.config import ModelConfig
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
config = ModelConfig("llama", 4096, 512, 2, 8, 2, 64, 1536, 8192, tie_embeddings=True)
place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
for fsdp, tensor in ((1, 1), (2, 2)):
    mesh = make_mesh(MeshSpec(fsdp=fsdp, tensor=tensor), devices[: fsdp * tensor])
    for int8, T in ((False, 1), (False, 512), (True, 1), (True, 512)):
        spec = cache.CacheSpec(4, 1020, dtype="bfloat16", int8=int8)
        weights = jax.tree.map(place, params.abstract(config, jnp.bfloat16), params.param_shardings(config, mesh))
        state = cache.abstract(config, spec, 2)
        state = jax.tree.map(place, state, cache.cache_shardings(state, mesh))
        tokens = place(jax.ShapeDtypeStruct((2, T), jnp.int32), batch_sharding(mesh))
        with jax.set_mesh(mesh):
            run = jax.jit(lambda p, c, t: stream.hidden(config, p, c, t))
            text = run.trace(weights, state, tokens).lower(lowering_platforms=("tpu",)).compile().as_text()
        assert "tpu_custom_call" in text, (fsdp, tensor, int8, T)
print("compiled")
"""


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the `preflight` extra"
)
def test_it_compiles_for_a_tpu():
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=600,
        env=os.environ | {  # libtpu does not know the flags of tests/conftest.py
            "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": "",
        },
    )  # fmt: skip
    assert "compiled" in done.stdout, done.stderr[-3000:]
