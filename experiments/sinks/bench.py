"""Tokens per second of SmolLM2-135M against Hugging Face transformers, on this machine, in one run.

  python -m experiments.sinks.bench                       # every contender, in turns
  python -m experiments.sinks.bench --modes=decode_float32,hf_float32 --rounds=5 --write

decode_*: one token at a time with a full cache of 4+1020; *_far: the same at token 1,000,000. chunk_*: streaming evaluation
of the same cache, 1,024 tokens at a time, with every prediction scored. hf_*: one token at a time with 1,024 tokens in
transformers' DynamicCache, which does no streaming: no more work than ours. The type in a name is the weights'; they are
random: only sizes count.

Every contender has a process of its own with 2 threads and the same allocator settings; contenders take turns, so that what
else the machine does hits all of them. Needs the `peers` extra. The memory limit is what a token must read (weights and
cache) over the bandwidth of a large copy, in turns with the tokens in the same process; medians of both.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from experiments.shared.bench import THREADS, Bench, timed

CACHE, CHUNK = 1024, 1024
SIZES: dict[str, Any] = dict(
    vocab_size=49152, width=576, depth=30, heads=9, kv_heads=3, head_dim=64
)
SIZES |= dict(mlp_dim=1536, max_positions=8192)
MODES = (
    "decode_float32", "decode_float32_far", "decode_float32_int8ring", "decode_bfloat16", "decode_int8",
    "decode_int8_far", "chunk_float32", "chunk_bfloat16", "hf_float32", "hf_bfloat16",
)  # fmt: skip
RESULTS = Path(__file__).parents[1] / "results" / "sinks" / "bench_decode.jsonl"


def ours(mode: str, steps: int) -> dict[str, Any]:
    """Times `stream.decode_step` or `policies.score_chunk`; seconds are per token."""
    from common.cpu_heap import keep_freed_memory

    keep_freed_memory()
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    import numpy as np

    from sinks import cache, params, perplexity, policies, stream
    from sinks.config import ModelConfig

    kind, weights_in, *rest = mode.split("_")
    config = ModelConfig("llama", **SIZES, rope_theta=1e5, tie_embeddings=True)
    half = jnp.bfloat16 if weights_in == "bfloat16" else jnp.float32
    weights = params.init(config, jax.random.key(0), half)
    if kind == "chunk":
        spec = cache.CacheSpec(4, CACHE - 4, dtype=weights_in)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, CHUNK * (steps + 3))
        pieces = perplexity.score(
            config, weights, policies.Cached(spec), tokens, chunk=CHUNK, state=None
        )
        return {"seconds": [s / CHUNK for s in timed(lambda: next(pieces), steps, warm=2)]}

    weights = stream.prepare(weights, int8=weights_in == "int8")
    # A lone token's products with the ring are fastest in float32.
    spec = cache.CacheSpec(4, CACHE - 4, int8="int8ring" in rest)
    looked_up = "embed" if "unembed" in weights else ""  # a row of it is read, not the whole
    read = jax.tree.leaves({name: p for name, p in weights.items() if name != looked_up})
    nbytes = sum(p.nbytes for p in read) + spec.nbytes(config)
    state = cache.init(config, spec)
    length = 1_000_000 if "far" in rest else 10_000
    state, token = replace(state, length=state.length + length), jnp.zeros(1, jnp.int32)
    key = jax.random.key(0)

    def step() -> None:
        nonlocal state, token
        token, state = stream.decode_step(config, weights, state, token, key)
        jax.block_until_ready(state)

    block = jnp.ones((2**26,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds: list[float] = []
    copies: list[float] = []
    for turn in range(steps):  # in turns, so that what else the machine does hits both
        seconds += timed(step, 8, warm=0 if turn else 3)
        copies += timed(lambda: jax.block_until_ready(copy(block)), 1, warm=not turn)
    limit = 2 * block.nbytes / statistics.median(copies) / nbytes
    return {"seconds": seconds, "limit": limit, "facts": {"memory_limit": limit}}


def hugging_face(mode: str, steps: int) -> dict[str, Any]:
    """Times transformers' LlamaForCausalLM on one token with CACHE tokens in its cache."""
    from common.cpu_heap import keep_freed_memory

    keep_freed_memory()
    import torch  # pyright: ignore[reportMissingImports]  # extra: peers
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]  # extra: peers

    torch.set_num_threads(THREADS)
    config = LlamaConfig(
        vocab_size=SIZES["vocab_size"], hidden_size=SIZES["width"], intermediate_size=SIZES["mlp_dim"],
        num_hidden_layers=SIZES["depth"], num_attention_heads=SIZES["heads"], num_key_value_heads=SIZES["kv_heads"],
        max_position_embeddings=SIZES["max_positions"], tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, mode.split("_")[1])).eval()
    token = torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        past = model(torch.zeros(1, CACHE, dtype=torch.long)).past_key_values

        def step() -> None:
            model(token, past_key_values=past, use_cache=True).logits[:, -1].argmax(-1)
            past.crop(-1)

        return {"seconds": timed(step, steps * 4, warm=3)}


def measure(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    return (hugging_face if mode.startswith("hf") else ours)(mode, args.steps)


BENCH = Bench(
    "experiments.sinks.bench", __doc__, "bench_sinks_decode", RESULTS, MODES, measure, unit="tokens", items=1,
    peers="hf", share="share_of_limit", steps=(4, "chunks, or eighths of tokens, a turn"),
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    sys.exit(main())
