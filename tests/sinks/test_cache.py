"""The cache: its size, its 8-bit form, its sharding, and sinks that are learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.mesh import MeshSpec, make_mesh
from sinks import cache, stream
from sinks.cache import CacheSpec
from sinks.config import ModelConfig
from sinks.params import param_shardings
from tests.sinks import small

SMOLLM2 = ModelConfig(
    "llama", 49152, 576, 30, heads=9, kv_heads=3, head_dim=64, mlp_dim=1536, max_positions=8192
)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("int8", [True, False])
def test_memory_is_the_formula(int8, stacked):
    for spec in (CacheSpec(4, 1020, int8=int8), CacheSpec(0, 7, dtype="bfloat16", int8=int8)):
        shapes = cache.abstract(SMOLLM2, spec, batch=3, stacked=stacked)
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
        assert held == spec.nbytes(SMOLLM2, batch=3)


def test_sinks_and_ring_take_what_the_paper_counts():
    """4 + 1020 tokens of 2 (keys, values) x 30 layers x 3 heads x 64 float32, and two counters."""
    full = CacheSpec(4, 1020).nbytes(SMOLLM2)
    assert full == 1024 * 2 * 30 * 3 * 64 * 4 + 8
    assert CacheSpec(4, 1020, int8=True).nbytes(SMOLLM2) < 0.27 * full


@pytest.mark.slow
def test_int8_does_not_depend_on_the_cuts_and_costs_little():
    c = small.config(head_dim=16, width=16)
    p = small.params(c)
    rows = [np.random.default_rng(0).integers(0, c.vocab_size, 40)]
    run = lambda cuts, **kw: small.stream_logits(c, p, CacheSpec(2, 9, **kw), rows, cuts)  # noqa: E731
    one_by_one, in_8_bits = run([[1]] * 40, int8=True)
    chunks, _ = run([[12], [12], [12], [1], [1], [1], [1]], int8=True)
    exact, _ = run([[12], [12], [12], [4]])
    np.testing.assert_allclose(chunks[0], one_by_one[0], atol=1e-4)
    error = np.abs(np.asarray(one_by_one[0] - exact[0]))
    assert 0 < error.mean() < 0.05 * np.std(exact[0])
    assert in_8_bits.ring["k"].dtype == jnp.int8
    assert in_8_bits.sink_kv["sink_k"].dtype == jnp.float32


@pytest.mark.slow
def test_a_sharded_cache_gives_what_one_device_gives():
    """Heads over `tensor`, rows over `replica` and `fsdp`."""
    c = small.config(vocab_size=16)
    p, spec = small.params(c), CacheSpec(2, 5)
    rows = [np.random.default_rng(b).integers(0, 16, 8 + b) for b in range(4)]
    want, alone = stream.extend(c, p, cache.init(c, spec, 4, stacked=True), rows, chunks=(4,))
    mesh = make_mesh(MeshSpec(replica=2, fsdp=2, tensor=2))
    p = jax.device_put(p, param_shardings(c, mesh))
    empty = cache.init(c, spec, 4, stacked=True)
    placed = jax.device_put(empty, cache.cache_shardings(empty, mesh))
    with jax.set_mesh(mesh):
        got, shared = stream.extend(c, p, placed, rows, chunks=(4,))
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_allclose(shared.ring["k"], alone.ring["k"], atol=1e-4)
    L, B, G, R, K = alone.ring["k"].shape
    assert shared.ring["k"].addressable_shards[0].data.shape == (L, B // 4, G // 2, R, K)


def test_a_mesh_that_does_not_divide_the_heads_is_refused():
    c = small.config(kv_heads=1)
    shapes = cache.abstract(c, CacheSpec(2, 5), 8)
    with pytest.raises(ValueError, match=r"ring/k .*1 does not divide by tensor=2"):
        cache.cache_shardings(shapes, make_mesh(MeshSpec(tensor=2)))


@pytest.mark.slow
def test_gradients_reach_learned_sink_logits():
    with jax.enable_x64(True):
        c = small.config(sink_logits="learned")
        p = small.params(c, jnp.float64)
        tokens = np.random.default_rng(0).integers(0, c.vocab_size, (2, 9))
        spec = CacheSpec(0, 16, dtype="float64")

        @jax.jit
        def loss(sink_logit):
            blocks = p["blocks"] | {"sink_logit": sink_logit}
            x = stream.hidden_from_start(c, p | {"blocks": blocks}, spec, tokens)
            return jnp.sum(jnp.sin(stream.unembed(c, p, x)))

        at = p["blocks"]["sink_logit"]
        gradient = jax.grad(loss)(at)
        step = 1e-5
        for layer, head in np.argwhere(np.abs(gradient) > 0.01)[:3]:
            up, down = (loss(at.at[layer, head].add(s)) for s in (step, -step))
            np.testing.assert_allclose(gradient[layer, head], (up - down) / (2 * step), rtol=1e-6)
        assert (np.abs(gradient) > 0.01).sum() >= 3


@pytest.mark.slow
def test_texts_from_the_start_need_no_cache():
    """The training pass is the stream, for a text longer than the cache too."""
    c, spec = small.config(), CacheSpec(3, 5)
    p = small.params(c)
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, (2, 20))
    x = stream.hidden_from_start(c, p, spec, tokens)
    want, _ = small.stream_logits(c, p, spec, list(tokens), [[20, 20]])
    np.testing.assert_allclose(stream.unembed(c, p, x), jnp.stack(want), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [dict(sinks=-1), dict(sinks=1.5), dict(recent=0), dict(recent="4"), dict(dtype="int4")],
    ids=str,
)
def test_impossible_caches_are_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        CacheSpec(**wrong)


def test_a_cache_in_float64_without_jaxs_64_bit_mode_is_refused():
    """JAX would make it float32 without a word."""
    with pytest.raises(ValueError, match="'float64' needs JAX's 64-bit mode"):
        cache.init(small.config(), CacheSpec(dtype="float64"))


@pytest.mark.parametrize("recent", [10**11, 10**20])
def test_a_cache_that_memory_cannot_hold_says_its_bytes(recent):
    spec = CacheSpec(0, recent)
    with pytest.raises(ValueError, match=f"recent={recent}: .* {spec.nbytes(SMOLLM2):,} bytes"):
        cache.init(SMOLLM2, spec)
