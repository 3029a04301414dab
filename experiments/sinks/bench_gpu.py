"""Tokens a second of an endless stream on a GPU, ours and the peers' in PyTorch, and the fast tests there (rows 1, 2, 3, 6).

  python -m experiments.sinks.bench_gpu [--minutes=8] [--out=PATH] [--smoke]

Every cache is full and every model has random weights: only sizes count. `ours` decodes 32 tokens in one program, `ours_1`
one in two, as `stream.decode_step` does. The bound of a token is what it must read, weights and cache, at the measured
bandwidth of a copy. Peers (bench_torch.py): gpt-fast's form with CUDA graphs, the released code's re-rotation of all keys,
and transformers with a dynamic and a static cache, which do no streaming: no more work than ours.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache as memory
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.shared.bench_gpu import (
    Cell,
    Contender,
    checked,
    compiled,
    repeated,
    run_part,
    torch_contender,
    torch_device,
)
from sinks import cache, params, stream
from sinks.config import ModelConfig

K = 32  # tokens a dispatch
MOST_BYTES = 110e9  # of weights and caches together


def _llama(vocab: int, width: int, depth: int, heads: int, kv_heads: int, mlp: int, tied: bool) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        "llama", vocab_size=vocab, width=width, depth=depth, heads=heads, kv_heads=kv_heads, head_dim=width // heads,
        mlp_dim=mlp, max_positions=32768, rope_theta=1e5, tie_embeddings=tied,
    )  # fmt: skip


MODELS = {
    "smollm2-135m": _llama(49152, 576, 30, 9, 3, 1536, True),
    "llama3.2-1b": _llama(128256, 2048, 16, 32, 8, 8192, True),
    "llama3-8b": _llama(128256, 4096, 32, 32, 8, 14336, False),
    "tiny": _llama(256, 64, 2, 4, 2, 128, True),
}


@memory
def _weights(model: str, int8: bool) -> dict[str, Any]:
    _weights.cache_clear()  # one model at a time
    made = jax.jit(partial(params.init, MODELS[model], dtype=jnp.bfloat16))(jax.random.key(0))
    return stream.prepare(made, int8=int8)


def ours(model: str, recent: int, rows: int, int8: bool, tokens: int) -> Contender:
    """Decodes `tokens` a dispatch; with 1, by the two programs of `stream.decode_step`."""
    config, weights = MODELS[model], _weights(model, int8)
    spec = cache.CacheSpec(4, recent, dtype="bfloat16")
    state = cache.init(config, spec, rows, stacked=isinstance(weights["blocks"], dict))
    state = replace(state, length=state.length + 10_000)
    looked_up = "embed" if "unembed" in weights else ""  # a row of it is read, not the whole
    read = jax.tree.leaves({name: p for name, p in weights.items() if name != looked_up})
    nbytes = sum(p.nbytes for p in read) + spec.nbytes(config, rows)
    counts: dict[str, Any] = {"items": rows, "nbytes": nbytes}
    token, key = jnp.zeros(rows, jnp.int32), jax.random.key(0)

    def one(held, weights):
        token, state = held
        x, kept = stream.read(config, weights, state, token[:, None], jnp.ones_like(token))
        logits = stream.unembed(config, weights, x)[:, 0]
        return jnp.argmax(logits, -1).astype(jnp.int32), cache.update(
            state, kept, jnp.ones_like(token)
        )

    if tokens == 1:
        step = lambda held: (stream.decode_step(config, weights, held[1], held[0], key), None)  # noqa: E731
        return Contender(repeated(step, (token, state)), **counts)

    def many(held, weights):
        return jax.lax.scan(lambda h, _: (one(h, weights), None), held, None, length=tokens)

    program, facts = compiled(many, (token, state), weights, donate=(0,))
    return Contender(
        repeated(lambda held: program(held, weights), (token, state)), tokens, facts=facts, **counts
    )


def peer(kind: str, model: str, recent: int, rows: int) -> Contender:
    """One of bench_torch's, in its fastest form."""
    from experiments.sinks import bench_torch

    config, device = MODELS[model], torch_device()
    where: dict[str, Any] = {"device": device, "steps": K}
    if kind.startswith("hf"):
        run = bench_torch.hugging_face(
            config, 4 + recent, rows, static=kind == "hf_static", **where
        )
    else:
        again = kind == "torch_rotate_all"  # new tensors each token: no graph can hold them
        mode = ("" if again else "reduce-overhead") if device.type == "cuda" else ""
        run = bench_torch.decoder(config, 4, recent, rows, rotate_all=again, mode=mode, **where)
    return torch_contender(run, steps=K, items=rows)


def check(dtype: str, tolerance: float) -> Contender:
    """Logits of a chunk after a full cache, here against the CPU's in float32."""
    config, rows = MODELS["tiny"], 2
    weights = params.init(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (rows, 48), 0, config.vocab_size)

    def logits(dtype, weights, tokens):
        weights = jax.tree.map(lambda p: p.astype(dtype), weights)
        state = cache.init(config, cache.CacheSpec(4, 12, dtype=dtype), rows, stacked=True)
        for part in jnp.split(tokens, 3, axis=1):
            x, state = stream.hidden(config, weights, state, part)
        return stream.unembed(config, weights, x).astype(jnp.float32)

    here, there = partial(logits, dtype), partial(logits, "float32")
    return checked(here, there, tolerance, weights, tokens)


def fast_tests() -> Contender:
    """The fast tests of sinks and metaopt on this device; which fail is said, and how many is in the row."""
    env = os.environ | {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}
    # without the conftest, which asks for CPU devices
    options = ["-q", "-n8", "-pno:cacheprovider", "--noconftest", "-Wdefault", "-m"]
    which = "not slow and not multiproc and not peers and not aot and not fuzz"
    command = [sys.executable, "-m", "pytest", *options, which]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, "tests/sinks", "tests/metaopt"], env=env, cwd=root, capture_output=True, text=True,
                          timeout=150, check=False)  # fmt: skip
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("FAILED")))
    counts = {
        kind: float(n)
        for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    }
    if not counts:
        raise RuntimeError((done.stdout + done.stderr)[-300:])
    return Contender(lambda: None, facts=counts)


def cells(smoke: bool) -> list[Cell]:
    peers = ("torch_graphs", "torch_rotate_all", "hf_dynamic", "hf_static")

    def decode(
        model: str,
        recent: int,
        rows: int,
        int8: bool = False,
        against: tuple = (),
        seconds: float = 30,
    ) -> Cell:
        turns = {"ours": partial(ours, model, recent, rows, int8, K)}
        if not int8:
            turns["ours_1"] = partial(ours, model, recent, rows, int8, 1)
        turns |= {kind: partial(peer, kind, model, recent, rows) for kind in against}
        dtype = "int8" if int8 else "bfloat16"
        return Cell(
            f"decode {model} {dtype} 4+{recent} rows={rows}", seconds + 20 * len(against), turns
        )

    if smoke:
        return [decode("tiny", 28, 2, against=peers, seconds=0)]
    exact, half = partial(check, "float32", 1e-5), partial(check, "bfloat16", 2e-2)
    found = [Cell("check", 30, {"float32": exact, "bfloat16": half})]
    # by importance: a run that is cut keeps the best
    found += [decode(m, 1020, 1, against=peers) for m in ("smollm2-135m", "llama3.2-1b")]
    found += [
        decode("smollm2-135m", 1020, rows, against=peers[:1] if rows == 8 else ())
        for rows in (8, 64, 256)
    ]
    found += [Cell("fast tests", 160, {"tests": fast_tests}, repeats=2)]
    for model in ("llama3-8b", "llama3.2-1b", "smollm2-135m"):
        for recent, rows, int8 in [
            (r, n, i) for i in (False, True) for r in (1020, 16380) for n in (1, 8, 64, 256)
        ]:
            spec = cache.CacheSpec(4, recent, dtype="bfloat16")
            weights = sum(p.size for p in jax.tree.leaves(params.abstract(MODELS[model]))) * 2
            cell = decode(model, recent, rows, int8)
            if weights + 2 * spec.nbytes(MODELS[model], rows) < MOST_BYTES and cell.name not in {
                c.name for c in found
            }:
                found.append(cell)
    return found


main = partial(run_part, "bench_gpu_sinks", cells)

if __name__ == "__main__":
    sys.exit(main())
