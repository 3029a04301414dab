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
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from experiments.shared.bench import chosen, run_worker, turns, write_row

CACHE, CHUNK, THREADS = 1024, 1024, 2
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
        return {"seconds": [s / CHUNK for s in _time(lambda: next(pieces), steps, warm=2)]}

    weights = stream.prepare(weights, int8=weights_in == "int8")
    # A lone token's products with the ring are fastest in float32.
    spec = cache.CacheSpec(4, CACHE - 4, int8="int8ring" in rest)
    looked_up = "embed" if "unembed" in weights else ""  # a row of it is read, not the whole
    read = jax.tree.leaves({name: p for name, p in weights.items() if name != looked_up})
    facts = {"bytes": sum(p.nbytes for p in read) + spec.nbytes(config)}
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
        seconds += _time(step, 8, warm=0 if turn else 3)
        copies += _time(lambda: jax.block_until_ready(copy(block)), 1, warm=not turn)
    return facts | {"seconds": seconds, "copied": 2 * block.nbytes, "copy_seconds": copies}


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

        return {"seconds": _time(step, steps * 4)}


def _time(run, steps: int, warm: int = 3) -> list[float]:
    times = []
    for _ in range(warm + steps):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times[warm:]


def _run(mode: str, steps: int) -> dict[str, Any]:
    return run_worker("experiments.sinks.bench", mode, "--steps", str(steps), threads=THREADS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sinks.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--modes", default=",".join(MODES), help="contenders, by comma (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns each contender gets")
    parser.add_argument("--steps", type=int, default=4, help="chunks, or eighths of tokens, a turn")
    parser.add_argument("--write", action="store_true", help=f"append a row to {RESULTS.name}")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        run = hugging_face if args.worker.startswith("hf") else ours
        print("RESULT " + json.dumps(run(args.worker, args.steps)))
        return 0
    modes = chosen(parser, args.modes, MODES)
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    copies: dict[str, list[float]] = {mode: [] for mode in modes}
    facts: dict[str, dict[str, Any]] = {}
    for mode in turns(modes, args.rounds):
        result = _run(mode, args.steps)
        seconds[mode] += result.pop("seconds")
        copies[mode] += result.pop("copy_seconds", [])
        facts[mode] = result
    for mode, times in copies.items():
        if times:
            facts[mode]["bandwidth"] = facts[mode]["copied"] / statistics.median(times)
    _report(seconds, facts, args)
    return 0


def _report(
    seconds: dict[str, list[float]], facts: dict[str, dict[str, Any]], args: argparse.Namespace
) -> None:
    rate = {mode: 1 / statistics.median(times) for mode, times in seconds.items()}
    peer = max((r for mode, r in rate.items() if mode.startswith("hf")), default=0.0)
    load = os.getloadavg()[0]
    print(
        f"\ntokens/s, medians of {args.rounds} turns, {THREADS} threads, load {load:.1f} at the end"
    )
    metrics: dict[str, float] = {"load": load}
    for mode, r in sorted(rate.items(), key=lambda item: -item[1]):
        metrics[f"tokens_per_second_{mode}"] = r
        line = f"  {mode:20s} {r:8.1f}   (fastest {1 / min(seconds[mode]):8.1f})"
        if peer and not mode.startswith("hf"):
            metrics[f"ratio_{mode}"] = r / peer
            line += f"  {r / peer:6.1f} x transformers' best token by token"
        if bandwidth := facts[mode].get("bandwidth"):
            limit = bandwidth / facts[mode]["bytes"]
            metrics |= {f"memory_limit_{mode}": limit, f"share_of_limit_{mode}": r / limit}
            line += f"  {100 * r / limit:4.0f} % of the memory limit {limit:.1f} ({bandwidth / 1e9:.1f} GB/s)"
        print(line)
    if args.write:
        write_row(RESULTS, "bench_sinks_decode", metrics, seconds, steps=args.steps * args.rounds)


if __name__ == "__main__":
    sys.exit(main())
