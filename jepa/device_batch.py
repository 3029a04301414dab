"""Batches made on the device, inside the train step: crops and masks of `fixed` mode, of images that lie there.

The masks' rules are those of `jepa.masks`, on JAX's arrays. Only the random numbers are others (float32, by JAX's keys), so
that a batch equals the host's in distribution, not in bits.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from common.augment import RandomResizedCrop, crop_on_device
from jepa.masks import Masks, MaskSpec, block_indices, draw_fixed


@dataclass(frozen=True)
class DeviceBatch:
    """`(images, drawn) -> batch`, traced into the step; its repr names it in a checkpoint's data fingerprint.

    images: uint8 [N, H, W, 3], the whole training set. drawn: "record" and "row", int32 [B], from
    `common.data.drawn_records`. Crop and masks of a row depend on (seed, row) alone.

    Raises ValueError for what the device does not do: masks of `paper` mode, colour distortion, blur.
    """

    crop: RandomResizedCrop
    masks: MaskSpec
    seed: int

    def __post_init__(self):
        if self.masks.mode != "fixed":
            raise ValueError(
                f"masks.mode={self.masks.mode!r}: data on the device have masks of mode 'fixed' alone; set "
                "data.on_device=False or masks.mode='fixed'"
            )
        if self.crop.color or self.crop.blur:
            raise ValueError(
                f"{self.crop}: the device crops and flips, and does not colour or blur"
            )

    def __call__(self, images: jax.Array, drawn: dict[str, jax.Array]) -> dict[str, Any]:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(self.seed)))(drawn["row"])
        crop_keys, mask_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        masks = sample(self.masks, mask_keys)
        return {
            "image": crop_on_device(self.crop, images[drawn["record"]], crop_keys),
            "context": masks.context,
            "targets": masks.targets,
            "target_valid": masks.target_valid,
        }


def sample(spec: MaskSpec, keys: jax.Array) -> Masks:
    """Masks of `fixed` mode, one image for each key [B]: see `jepa.masks.sample`."""
    b, n, budget = len(keys), spec.grid[0] * spec.grid[1], spec.context_size

    def uniforms(draw: jax.Array | int, count: int) -> jax.Array:
        return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, draw), (count,)))(
            keys
        )

    def again(drawn):
        draw, targets, free = drawn
        new_targets, new_free = draw_fixed(spec, partial(uniforms, draw))
        done = (free.sum(1) >= budget)[:, None]
        targets = jnp.where(done[..., None], targets, new_targets)
        return draw + 1, targets, jnp.where(done, free, new_free)

    # It ends: of a spec that was built, half of all images succeed at a draw.
    nothing = jnp.zeros((b, spec.num_targets, 4), jnp.int32), jnp.zeros((b, n), bool)
    short = lambda drawn: (drawn[2].sum(1) < budget).any()  # noqa: E731
    _, targets, free = lax.while_loop(short, again, (jnp.int32(1), *nothing))
    rank = jnp.where(free, uniforms(0, n), 1)
    context = jnp.sort(lax.top_k(-rank, budget)[1], axis=1).astype(jnp.int32)
    return Masks(context, jnp.ones((b, budget), bool), *block_indices(spec, targets))
