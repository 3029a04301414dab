"""Training images per second of our I-JEPA step against PyTorch's, on this machine, in one run.

  python -m experiments.jepa.bench                          # peer: the step from Hugging Face's I-JEPA modules
  python -m experiments.jepa.bench --official=PATH          # peer: a checkout of facebookresearch/ijepa
  python -m experiments.jepa.bench --modes=ours,torch_bf16 --rounds=5

The shapes of issue and README: encoder 192 wide, 12 deep, 3 heads, patch 4 on 32x32; predictor 96 wide, 6 deep; batch 128;
12 context tokens, 4 targets of 12. Every contender has a process of its own with 2 threads and the same allocator
settings; contenders take turns, so that what else the machine does hits all of them. Needs the `peers` extra.

Writes a row to experiments/results/jepa/bench_step.jsonl with --write.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from experiments.shared.bench import chosen, run_worker, turns, write_row

BATCH, IMAGE, PATCH, WIDTH, DEPTH, HEADS = 128, 32, 4, 192, 12, 3
P_WIDTH, P_DEPTH, CONTEXT, TARGETS, TARGET = 96, 6, 12, 4, 12
THREADS = 2
MODES = ("ours", "ours_scan", "torch_float32", "torch_bf16", "torch_bf16_compiled")
RESULTS = Path(__file__).parents[1] / "results" / "jepa" / "bench_step.jsonl"


def ours(steps: int, unroll: int | None) -> dict[str, Any]:
    """Times the real train step (common/train_step.py) of the real recipe."""
    from common.cpu_heap import keep_freed_memory, set_fragments_aside

    keep_freed_memory()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from common.flops import measure_matmul_peak, traced_flops
    from common.nn.cpu import compiler_options
    from common.nn.policy import Policy
    from common.optim import OptimSpec, adamw
    from common.state import init_state
    from common.train_step import make_train_step
    from jepa.config import vit
    from jepa.masks import MaskSpec
    from jepa.recipe import AddMasks, EmaSpec, IJepa

    model = vit("tiny", image=IMAGE, patch=PATCH)
    masks = MaskSpec(grid=model.grid, context_tokens=CONTEXT)
    assert (masks.context_size, masks.target_size) == (CONTEXT, TARGET)
    tx, momentum = adamw(OptimSpec(), 10_000), EmaSpec().schedule(10_000)
    recipe = IJepa(model, masks, tx, momentum, policy=Policy(unroll=unroll))
    images = np.random.default_rng(0).integers(0, 256, (BATCH, IMAGE, IMAGE, 3), np.uint8)
    batch = jax.device_put(AddMasks(masks, 0)({"image": images}, np.arange(BATCH)))
    state = init_state(recipe, jax.random.key(0))
    step = make_train_step(recipe)
    flops = traced_flops(step, state, batch, jnp.int32(0))
    began = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
    compiled = jitted.lower(state, batch, jnp.int32(0)).compile()
    compile_seconds = time.perf_counter() - began
    set_fragments_aside()

    before = None

    def run(i: int) -> None:
        # As in the train loop, the next step is on its way while this one runs.
        nonlocal state, before
        state, metrics = compiled(state, batch, jnp.int32(i))
        jax.block_until_ready(before)
        before = metrics

    seconds = _time(run, steps)
    return {
        "seconds": seconds,
        "flops": flops,
        "peak": measure_matmul_peak(),
        "compile_seconds": compile_seconds,
    }


def torch_peer(steps: int, mode: str, official: str) -> dict[str, Any]:
    """Times the peer's step: forward of both encoders and the predictor, backward, AdamW, EMA."""
    from common.cpu_heap import keep_freed_memory

    keep_freed_memory()
    import torch  # pyright: ignore[reportMissingImports]  # extra: peers

    from experiments.jepa import bench_torch as torch_ijepa

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    build = torch_ijepa.from_official if official else torch_ijepa.from_transformers
    step = torch_ijepa.make_step(
        build(official, IMAGE, PATCH, WIDTH, DEPTH, HEADS, P_WIDTH, P_DEPTH),
        bf16="bf16" in mode,
        compiled="compiled" in mode,
    )
    images = torch.rand(BATCH, 3, IMAGE, IMAGE)
    tokens = (IMAGE // PATCH) ** 2

    def subset(k: int) -> torch.Tensor:
        return torch.stack([torch.randperm(tokens)[:k].sort().values for _ in range(BATCH)])

    context = [subset(CONTEXT)]
    targets = [subset(TARGET) for _ in range(TARGETS)]
    return {"seconds": _time(lambda i: float(step(images, context, targets)), steps)}


def _time(run, steps: int, warm: int = 15) -> list[float]:
    """Seconds of each step, once memory has settled: the first steps of a process still fault in new pages."""
    times = []
    for i in range(warm + steps):
        began = time.perf_counter()
        run(i)
        times.append(time.perf_counter() - began)
    return times[warm:]


def _worker(mode: str, steps: int, official: str) -> None:
    if mode.startswith("ours"):
        result = ours(steps, unroll=1 if mode == "ours_scan" else None)
    else:
        result = torch_peer(steps, mode, official)
    print("RESULT " + json.dumps(result))


def _run(mode: str, steps: int, official: str) -> dict[str, Any]:
    arguments = ("--steps", str(steps), "--official", official)
    return run_worker("experiments.jepa.bench", mode, *arguments, threads=THREADS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.jepa.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--official", default="", help="checkout of facebookresearch/ijepa (default: HF modules)"
    )
    parser.add_argument(
        "--modes", default=",".join(MODES), help="contenders, by comma (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns each contender gets")
    parser.add_argument("--steps", type=int, default=12, help="timed steps per turn")
    parser.add_argument("--write", action="store_true", help=f"append a row to {RESULTS.name}")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        _worker(args.worker, args.steps, args.official)
        return 0
    modes = chosen(parser, args.modes, MODES)
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    extra: dict[str, Any] = {}
    for mode in turns(modes, args.rounds):
        result = _run(mode, args.steps, args.official)
        seconds[mode] += result.pop("seconds")
        if mode.startswith("ours"):
            extra[mode] = result
    _report(seconds, extra, args)
    return 0


def _report(
    seconds: dict[str, list[float]], extra: dict[str, Any], args: argparse.Namespace
) -> None:
    rate = {mode: BATCH / statistics.median(times) for mode, times in seconds.items()}
    peers = {mode: r for mode, r in rate.items() if mode.startswith("torch")}
    best_peer = max(peers.values(), default=0.0)
    peer = "the official step" if args.official else "the step from transformers' modules"
    print(
        f"\nimages/s, median of {args.rounds} x {args.steps} steps, {THREADS} threads; torch: {peer}"
    )
    for mode, r in sorted(rate.items(), key=lambda item: -item[1]):
        ratio = f"  {r / best_peer:5.2f} x torch's best" if best_peer else ""
        fastest = BATCH / min(seconds[mode])
        print(f"  {mode:22s} {r:7.1f}   (fastest step {fastest:7.1f}){ratio}")
    metrics = {f"images_per_second_{mode}": r for mode, r in rate.items()}
    if best_peer:
        metrics |= {f"ratio_{m}": rate[m] / best_peer for m in rate if m.startswith("ours")}
    for mode, facts in extra.items():
        reached = facts["flops"] * rate[mode] / BATCH
        print(
            f"  {mode}: {facts['flops'] / 1e9:.0f} GFLOP per step; limit {facts['peak'] / 1e9:.0f} GFLOP/s (a large bf16 "
            f"product here), reached {reached / 1e9:.0f} = {100 * reached / facts['peak']:.0f} %; compiled in "
            f"{facts['compile_seconds']:.0f} s"
        )
        metrics |= {
            f"gflop_per_step_{mode}": facts["flops"] / 1e9,
            f"share_of_peak_{mode}": reached / facts["peak"],
        }
    if args.write:
        write_row(
            RESULTS, "bench_jepa_step", metrics, seconds, steps=args.steps * args.rounds, arg=peer
        )


if __name__ == "__main__":
    sys.exit(main())
