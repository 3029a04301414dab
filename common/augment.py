"""Per-record image transforms on the host (I-JEPA's released recipe; docs/papers/ijepa.md 1.7).

Records hold uint8 [H, W, 3] images and leave as uint8: 4x less to move than float32, and the device
normalises for free (`normalize`). Every random choice comes from the Generator that is passed in,
so an example's augmentation depends on (seed, row) alone; see `common.data.train_batches`.

A transform is a frozen dataclass `(record, rng) -> record`: it pickles to worker processes, and
its `repr` names it, with every setting, in a checkpoint's data fingerprint.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

Record = Mapping[str, Any]
Range = tuple[float, float]
Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels; right and lower exclusive

MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet's, of images in [0, 1]
STD = np.array([0.229, 0.224, 0.225], np.float32)

JITTER_P, GRAY_P, FLIP_P, BLUR_P = 0.8, 0.2, 0.5, 0.5
BLUR_RADIUS: Range = (0.1, 2.0)  # pixels; not in the paper, the usual range of self-supervised work
CROP_TRIES = 10


@dataclass(frozen=True)
class RandomResizedCrop:
    """The pretraining transform: a random crop resized to `size`; the rest is off in I-JEPA.

    scale: range of the crop's share of the image's area. ratio: range of its width / height.
    flip: mirror half the images. color: strength s of the colour distortion (jitter with ranges
    .8s, .8s, .8s, .2s and probability .8, then grey with probability .2); 0 is off.
    blur: Gaussian blur of half the images, with a radius in pixels of the output.
    """

    size: int
    scale: Range = (0.3, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    flip: bool = False
    color: float = 0.0
    blur: bool = False

    def __post_init__(self):
        low, high = self.scale
        if self.size < 1 or not 0 < low <= high <= 1:
            raise ValueError(f"{self}: size must be at least 1 and 0 < scale[0] <= scale[1] <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"{self}: ratio must be an increasing pair of positive numbers")
        if not 0 <= self.color <= 2.5:  # beyond, the hue would turn by more than half a circle
            raise ValueError(f"{self}: color must lie in 0 to 2.5")

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        image = random_resized_crop(record["image"], rng, self.size, self.scale, self.ratio)
        if self.flip and rng.random() < FLIP_P:
            image = image[:, ::-1]
        if self.color:
            image = color_distortion(image, rng, self.color)
        if self.blur and rng.random() < BLUR_P:
            radius = _uniform(rng.random(), BLUR_RADIUS)
            image = _to_array(_to_pil(image).filter(ImageFilter.GaussianBlur(radius)))
        return {**record, "image": image}


@dataclass(frozen=True)
class CenterCrop:
    """The evaluation transform: resize the short side to `resize`, cut the central `size` square.

    `resize` defaults to size * 256 / 224, the usual margin for ImageNet. Give `resize=size` for
    small images such as CIFAR's, which then pass through untouched when they have that size.
    """

    size: int
    resize: int | None = None

    def __post_init__(self):
        if self.size < 1 or (self.resize is not None and self.resize < self.size):
            raise ValueError(f"{self}: needs 1 <= size <= resize")

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        del rng  # a transform has one signature; this one is deterministic
        image = record["image"]
        _check(image)
        height, width, _ = image.shape
        scale = (self.resize or round(self.size * 256 / 224)) / min(height, width)
        height, width = (max(self.size, round(side * scale)) for side in (height, width))
        if (height, width) != image.shape[:2]:
            image = _to_array(_to_pil(image).resize((width, height), Image.Resampling.BILINEAR))
        upper, left = (height - self.size) // 2, (width - self.size) // 2
        return {**record, "image": image[upper : upper + self.size, left : left + self.size]}


def normalize(x_BHWC: jax.Array) -> jax.Array:
    """uint8 [..., 3] to float32 with ImageNet's mean and deviation; to be called inside jit."""
    scale, shift = (
        jax.lax.broadcast_to_rank(x, x_BHWC.ndim) for x in (1 / (255 * STD), MEAN / STD)
    )
    return x_BHWC.astype(jnp.float32) * scale - shift


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    scale: Range = (0.3, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
) -> np.ndarray:
    """A random crop of uint8 [H, W, 3] as [size, size, 3]; bilinear with antialiasing."""
    _check(image)
    height, width, _ = image.shape
    left, upper, right, lower = crop_box((width, height), rng, scale, ratio)
    # Cut first: PIL's `resize(box=...)` would filter in pixels from outside the box.
    crop = _to_pil(image[upper:lower, left:right])
    return _to_array(crop.resize((size, size), Image.Resampling.BILINEAR))


def crop_box(size: tuple[int, int], rng: np.random.Generator, scale: Range, ratio: Range) -> Box:
    """Draws a crop of an image of `size` (width, height).

    Area uniform in `scale`, aspect log-uniform in `ratio`, position uniform among those that fit.
    After ten draws that do not fit: the largest central crop whose aspect lies in `ratio`.
    """
    width, height = size
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(CROP_TRIES):
        u = rng.random(4).tolist()  # one call: drawing singly costs more than the crop itself
        area = width * height * _uniform(u[0], scale)
        aspect = math.exp(_uniform(u[1], log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(u[2] * (width - w + 1)), int(u[3] * (height - h + 1))
            return left, upper, left + w, upper + h
    return _central_box(size, ratio)


def _central_box(size: tuple[int, int], ratio: Range) -> Box:
    width, height = size
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def color_distortion(image: np.ndarray, rng: np.random.Generator, s: float) -> np.ndarray:
    """Jitters brightness, contrast, saturation and hue in random order, then greys some images."""
    pil = _to_pil(image)
    if rng.random() < JITTER_P:
        factors = [_uniform(u, (max(0.0, 1 - 0.8 * s), 1 + 0.8 * s)) for u in rng.random(3)]
        turn = _uniform(rng.random(), (-0.2 * s, 0.2 * s))
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for k in rng.permutation(4):
            pil = _turn_hue(pil, turn) if k == 3 else enhancers[k](pil).enhance(factors[k])
    if rng.random() < GRAY_P:
        pil = pil.convert("L").convert("RGB")
    return _to_array(pil)


def _check(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}; "
            "common.data.open_source turns grey images into this form"
        )


def _to_pil(image: np.ndarray) -> Image.Image:
    height, width, _ = image.shape
    return Image.frombytes("RGB", (width, height), image.tobytes())  # cheaper than fromarray


def _to_array(image: Image.Image) -> np.ndarray:
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


def _uniform(u: float, bounds: Range) -> float:
    return bounds[0] + float(u) * (bounds[1] - bounds[0])


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Adds `turn` of a full circle to the hue."""
    hue, saturation, value = image.convert("HSV").split()
    shift = round(turn * 255)
    hue = hue.point([(h + shift) % 256 for h in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def crop_on_device(spec: RandomResizedCrop, images: jax.Array, keys: jax.Array) -> jax.Array:
    """`spec`'s crop and flip of each image, inside jit: uint8 [B, H, W, 3] and keys [B] to uint8 [B, size, size, 3].

    Equal to the host's in distribution, and for a given box within 2 of 255 (tests/common/test_augment.py).
    """
    height, width = images.shape[1:3]
    u = jax.vmap(lambda key: jax.random.uniform(key, (4 * CROP_TRIES + 1,)))(keys)
    boxes = crop_boxes((width, height), u[:, 1:].reshape(-1, CROP_TRIES, 4), spec.scale, spec.ratio)
    flips = (u[:, 0] < FLIP_P) & spec.flip
    return resize_boxes(images, boxes, flips, spec.size)


def crop_boxes(size: tuple[int, int], u: jax.Array, scale: Range, ratio: Range) -> jax.Array:
    """`crop_box` for uniforms [B, tries, 4]: float32 [B, 4], left, upper, right, lower."""
    width, height = size
    lerp = lambda u, bounds: bounds[0] + u * (bounds[1] - bounds[0])  # noqa: E731
    area = width * height * lerp(u[..., 0], scale)
    aspect = jnp.exp(lerp(u[..., 1], (math.log(ratio[0]), math.log(ratio[1]))))
    w, h = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    left, upper = jnp.floor(u[..., 2] * (width - w + 1)), jnp.floor(u[..., 3] * (height - h + 1))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    drawn = jnp.stack([left, upper, left + w, upper + h], -1)
    first = jnp.take_along_axis(drawn, fits.argmax(1)[:, None, None], 1)[:, 0]
    fallback = jnp.array(_central_box(size, ratio), jnp.float32)
    return jnp.where(fits.any(1, keepdims=True), first, fallback[None])


def resize_boxes(images: jax.Array, boxes: jax.Array, flips: jax.Array, size: int) -> jax.Array:
    """Each image's box [B, 4], mirrored where `flips` [B], as uint8 [B, size, size, 3]: PIL's bilinear filter, which
    averages over what a pixel covers, as a product with rows of weights for each axis."""
    left, upper, right, lower = (side[:, None, None] for side in boxes.T)

    def weights(start: jax.Array, stop: jax.Array, pixels: int) -> jax.Array:
        """[B, size, pixels]: what each source pixel gives to each pixel of the output."""
        scale = (stop - start) / size
        centre = start + (jnp.arange(size)[None, :, None] + 0.5) * scale
        at = jnp.arange(pixels)[None, None] + 0.5
        near = jnp.maximum(1 - jnp.abs(at - centre) / jnp.maximum(scale, 1), 0)
        near = jnp.where((at > start) & (at < stop), near, 0)
        return near / near.sum(-1, keepdims=True)

    def filtered(formula: str, weight: jax.Array, x: jax.Array) -> jax.Array:
        # Ties are frequent: they go up, as PIL's mostly do, for every order in which a program adds.
        return jnp.floor(jnp.einsum(formula, weight, x, precision="highest") + 0.501)

    across = weights(left, right, images.shape[2])
    across = jnp.where(flips[:, None, None], across[:, ::-1], across)
    x = filtered("bow,bhwc->bhoc", across, images.astype(jnp.float32))
    return filtered("boh,bhwc->bowc", weights(upper, lower, images.shape[1]), x).astype(jnp.uint8)
