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
import itertools
import sys
import time
from pathlib import Path
from typing import Any

from experiments.shared.bench import THREADS, Bench, timed

BATCH, IMAGE, PATCH, WIDTH, DEPTH, HEADS = 128, 32, 4, 192, 12, 3
P_WIDTH, P_DEPTH, CONTEXT, TARGETS, TARGET = 96, 6, 12, 4, 12
WARM = 15  # steps until memory has settled
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
    from common.mesh import MeshSpec, make_mesh
    from common.nn.ops import Policy, compiler_options
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
    mesh = make_mesh(MeshSpec())
    policy = Policy(unroll=unroll).built_for(mesh, model.tokens * model.hidden)
    recipe = IJepa(model, masks, tx, momentum, policy=policy)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, IMAGE, IMAGE, 3), np.uint8)
    batch = jax.device_put(AddMasks(masks, 0)({"image": images}, np.arange(BATCH)))
    state = init_state(recipe, jax.random.key(0))
    step = make_train_step(recipe)
    flops = traced_flops(step, state, batch, jnp.int32(0))
    began = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=0, compiler_options=compiler_options(mesh))
    compiled = jitted.lower(state, batch, jnp.int32(0)).compile()
    compile_seconds = time.perf_counter() - began
    set_fragments_aside()

    before, steps_so_far = None, map(jnp.int32, itertools.count())

    def run() -> None:
        # As in the train loop, the next step is on its way while this one runs.
        nonlocal state, before
        state, metrics = compiled(state, batch, next(steps_so_far))
        jax.block_until_ready(before)
        before = metrics

    seconds = timed(run, steps, WARM)
    return {
        "seconds": seconds,
        "limit": BATCH * measure_matmul_peak() / flops,  # a large product of bfloat16 here
        "facts": {"gflop_per_step": flops / 1e9, "compile_seconds": compile_seconds},
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
    return {"seconds": timed(lambda: float(step(images, context, targets)), steps, WARM)}


def measure(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    if mode.startswith("ours"):
        return ours(args.steps, unroll=1 if mode == "ours_scan" else None)
    return torch_peer(args.steps, mode, args.official)


BENCH = Bench(
    "experiments.jepa.bench", __doc__, "bench_jepa_step", RESULTS, MODES, measure, unit="images", items=BATCH,
    peers="torch", share="share_of_peak", steps=(12, "timed steps per turn"),
    official="checkout of facebookresearch/ijepa (default: HF modules)",
    arg=lambda args: "the official step" if args.official else "the step from transformers' modules",
)  # fmt: skip
main = BENCH.main

if __name__ == "__main__":
    sys.exit(main())
