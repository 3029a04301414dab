"""The TPU kernel, interpreted here, gives what the XLA path gives; and it compiles for a TPU where libtpu is installed."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinks import attention
from sinks.cache import CacheSpec
from tests.sinks import small


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU's branch, taken on this machine."""
    real = attention.kernel.mix
    monkeypatch.setattr(
        attention.kernel, "mix", lambda *args, **kw: real(*args, **kw, interpret=True)
    )
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *, tpu, default: tpu())


@pytest.mark.parametrize(
    "model, sinks, recent",
    [
        (dict(), 4, 5),
        (dict(kv_heads=1, sink_logits="learned"), 0, 7),
        (dict(alibi=True, rope_theta=0.0, sink_logits="zero"), 2, 150),
        (dict(kv_heads=4, rope_fraction=0.5), 1, 3),
    ],
)
def test_the_kernel_gives_what_xla_gives(model, sinks, recent, request, monkeypatch):
    c = small.config(**model)
    p, spec = small.params(c), CacheSpec(sinks, recent)
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
from jax.sharding import SingleDeviceSharding
from sinks import cache, params, stream
from sinks.config import ModelConfig
device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
here = SingleDeviceSharding(device)
place = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)
config = ModelConfig("llama", 4096, 576, 2, 9, 3, 64, 1536, 8192, tie_embeddings=True)
spec = cache.CacheSpec(4, 1020, dtype="bfloat16")
for T in (1, 512):
    tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
    args = place((params.abstract(config, jnp.bfloat16), cache.abstract(config, spec, 2), tokens))
    run = jax.jit(lambda p, c, t: stream.hidden(config, p, c, t))
    text = run.trace(*args).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert "tpu_custom_call" in text, T
print("compiled")
"""


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the `tpu` extra")
def test_it_compiles_for_a_tpu():
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=600,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    )  # fmt: skip
    assert "compiled" in done.stdout, done.stderr[-3000:]
