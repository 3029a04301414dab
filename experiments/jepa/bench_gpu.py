"""Images a second of a whole I-JEPA step on a GPU, ours and the peer's in PyTorch (rows 10 and 11).

  python -m experiments.jepa.bench_gpu [--minutes=8] [--out=PATH] [--smoke]

`ours` has its images on the device and makes crops and masks inside the step, several steps a dispatch, as a training with
--config.data.on_device does. `ours_bare` and the peer, transformers' layers of the same shapes (bench_torch.py), get one
batch with its masks ready. bfloat16, at the largest batch that fits. The share of the bound is model FLOPs over the measured
product's rate: MFU.
"""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from common.augment import RandomResizedCrop
from common.flops import traced_flops
from common.mesh import MeshSpec, make_mesh
from common.nn.ops import Policy
from common.optim import OptimSpec, adamw
from common.state import init_state
from common.train_step import AS_IT_IS, make_dispatch, make_train_step
from experiments.shared.bench_gpu import (
    Cell,
    Contender,
    checked,
    compiled,
    largest,
    run_part,
    torch_contender,
    torch_device,
)
from jepa.config import ViTConfig, vit
from jepa.device_batch import DeviceBatch
from jepa.masks import MaskSpec
from jepa.recipe import AddMasks, EmaSpec, IJepa

# model, side of the stored images, images in memory, steps a dispatch
T4 = vit("tiny", image=32, patch=4), 32, 50_000, 10
S16 = vit("small", image=224, patch=16), 256, 4096, 2
B16 = vit("base", image=224, patch=16), 256, 4096, 2
H14 = vit("huge", image=224, patch=14), 256, 4096, 2
TINY = replace(T4[0], width=32, depth=1, heads=2, hidden=64, predictor_width=16, predictor_depth=1)
Shape = tuple[ViTConfig, int, int, int]


def _recipe(model: ViTConfig, policy: Policy) -> IJepa:
    tx, momentum = adamw(OptimSpec(), 10_000), EmaSpec().schedule(10_000)
    return IJepa(model, MaskSpec(grid=model.grid), tx, momentum, policy=policy)


def ours(shape: Shape, bare: bool, batch: int) -> Contender:
    """The train loop's own step: forward of both encoders and the predictor, backward, AdamW, EMA."""
    model, side, count, k = shape
    recipe = _recipe(model, Policy(unroll=1).built_for(make_mesh(MeshSpec())))
    rng = np.random.default_rng(0)
    pixels = (batch if bare else count, side, side, 3)
    images = rng.integers(0, 256, pixels, np.uint8)
    if bare:
        images = images[:, : model.image[0], : model.image[1]]
        ready = jax.device_put(AddMasks(recipe.masks, 0)({"image": images}, np.arange(batch)))
        inputs, prepare = (ready,) * k, AS_IT_IS
    else:
        crop = RandomResizedCrop(model.image[0], flip=True)
        prepare = Partial(DeviceBatch(crop, recipe.masks, seed=0), jax.device_put(images))
        rows = np.arange(k * batch, dtype=np.int32).reshape(k, batch)
        records = rng.integers(0, count, (k, batch), np.int32)
        inputs = tuple({"record": a, "row": b} for a, b in zip(records, rows))
    step = make_train_step(recipe)
    state = init_state(recipe, jax.random.key(0))
    flops = traced_flops(step, state, recipe.batch_shapes(batch), jnp.int32(0))
    dispatch = make_dispatch(step)
    program, facts = compiled(dispatch, state, inputs, jnp.int32(0), prepare, donate=(0,))
    held: list[Any] = [state, 0]
    del state

    def run() -> None:
        held[0], metrics = program(held[0], inputs, jnp.int32(held[1]), prepare)
        held[1] += k
        if not np.isfinite(jax.device_get(metrics["grad_norm"].sum)).all():
            raise FloatingPointError("a step is not finite")

    return Contender(run, k, items=batch, flops=flops, facts=facts)


def peer(shape: Shape, mode: str, batch: int) -> Contender:
    """The same step by transformers' layers, with fused AdamW: "eager", or torch.compile's mode."""
    import torch  # pyright: ignore[reportMissingImports]  # extra: peers

    from experiments.jepa import bench_torch

    model, masks, device = shape[0], MaskSpec(grid=shape[0].grid), torch_device()
    sizes = model.image[0], model.patch, model.width, model.depth, model.heads
    models = bench_torch.from_transformers("", *sizes, model.predictor_width, model.predictor_depth)
    step = bench_torch.make_step(
        models, bf16=True, compiled="" if mode == "eager" else mode, device=device
    )
    images = torch.rand(batch, 3, *model.image, device=device)

    def subset(size: int) -> torch.Tensor:
        return torch.rand(batch, model.tokens, device=device).argsort(1)[:, :size].sort(1).values

    context = [subset(masks.context_size)]
    targets = [subset(masks.target_size) for _ in range(masks.num_targets)]
    return torch_contender(lambda: step(images, context, targets), items=batch)


def check(dtype: str, tolerance: float) -> Contender:
    """Loss and gradient of a small model here, against the CPU's in float32."""

    def loss_in(dtype: str, form: str | None):
        # Its contexts, too, have the 256 tokens from which attention is fused.
        recipe = _recipe(replace(TINY, image=(64, 64), patch=2), Policy(compute=dtype, form=form))
        grad = jax.value_and_grad(lambda p, x, b: recipe.loss(p, x, b, None)[0])

        def both(params, extra, batch):
            loss, grads = grad(params, extra, batch)
            return loss, optax.tree.norm(grads)

        return recipe, both

    recipe, here = loss_in(dtype, Policy().built_for(make_mesh(MeshSpec())).form)
    images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    batch = AddMasks(recipe.masks, 0)({"image": images}, np.arange(8))
    params = recipe.init(jax.random.key(0))
    return checked(
        here, loss_in("float32", "plain")[1], tolerance, params, recipe.init_extra(params), batch
    )


def cells(smoke: bool) -> list[Cell]:
    found = []
    if not smoke:
        exact, half = partial(check, "float32", 1e-4), partial(check, "bfloat16", 2e-2)
        found.append(Cell("check", 40, {"float32": exact, "bfloat16": half}))
    plans = [
        ("T/4", T4, 512, 60),
        ("T/4", T4, 2048, 60),
    ]  # by importance: a run that is cut keeps the best
    plans += [("H/14", H14, 256, 180), ("B/16", B16, 1024, 120), ("S/16", S16, 2048, 100)]
    for name, shape, batch, estimate in [("tiny", (TINY, 32, 64, 2), 8, 1)] if smoke else plans:
        turns = {"ours": partial(ours, shape, False), "ours_bare": partial(ours, shape, True)}
        modes = ["eager"] if smoke else ["eager", "default"]
        turns |= {f"torch_{mode}": partial(peer, shape, mode) for mode in modes}
        made = {k: partial(largest, make, batch) for k, make in turns.items()}
        found.append(Cell(f"step {name} batch={batch}", estimate, made))
    return found


main = partial(run_part, "bench_gpu_jepa", cells)

if __name__ == "__main__":
    sys.exit(main())
