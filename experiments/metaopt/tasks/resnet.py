"""ResNet-20 on CIFAR-10 (He et al. 2016, section 4.2), the paper's figure 2: 0.27 M parameters.

Legend: B batch, H/W image height and width, C channels in, D out, N classes, h/w kernel height and width.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from common.nn.module import define
from experiments.metaopt.grid import Task
from experiments.metaopt.tasks.mlp import read_images

Moments = tuple[jax.Array, jax.Array]  # mean and variance by channel, [C] each
EPSILON = 1e-5


class Normalizer:
    """The moments of every batch norm of one pass, in the order of the layers: those given, or else the batch's own."""

    def __init__(self, given: list[Moments] | None = None):
        self.given = None if given is None else iter(given)
        self.used: list[Moments] = []

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        if self.given is None:
            moments = x_BHWC.mean((0, 1, 2)), x_BHWC.var((0, 1, 2))
        else:
            moments = next(self.given)
        self.used.append(moments)
        mean, variance = (jax.lax.broadcast_to_rank(m, 4) for m in moments)
        return (x_BHWC - mean) * jax.lax.rsqrt(variance + EPSILON)


def convolve_by_product(
    x_BHWC: jax.Array, w_hwCD: jax.Array, strides: Sequence[int], padding: str, **_: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of images, as one product of matrices.

    For CPU, where XLA puts a convolution's gradients into the form it has fast code for only outside of loops: inside of
    one, a step of a ResNet-8 takes 17 s, not 0.5.
    """
    h, w, C, D = w_hwCD.shape
    B, *size = x_BHWC.shape[:3]
    pads = jax.lax.padtype_to_pads(size, (h, w), strides, padding)
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), *pads, (0, 0)))
    H, W = ((n - k) // s + 1 for n, k, s in zip(x_BHWC.shape[1:3], (h, w), strides, strict=True))

    def every(start: int, count: int, stride: int) -> slice:
        return slice(start, start + (count - 1) * stride + 1, stride)

    columns = [x_BHWC[:, :, every(j, W, strides[1])] for j in range(w)]
    x_NK = jnp.concatenate(columns, -1).reshape(-1, w * C)
    # One product for all rows of the kernel, whose results are shifted and added: they are fewer than the operands.
    y_BHWhD = (x_NK @ jnp.moveaxis(w_hwCD, 0, 2).reshape(w * C, h * D)).reshape(B, -1, W, h, D)
    return jnp.asarray(sum(y_BHWhD[:, every(i, H, strides[0]), :, i] for i in range(h)))


class ConvNorm(nnx.Module):
    """A 3x3 convolution without bias, and batch normalisation."""

    def __init__(self, n_in: int, n_out: int, stride: int, rngs: nnx.Rngs):
        on_cpu = jax.default_backend() == "cpu"
        self.conv = nnx.Conv(
            n_in,
            n_out,
            (3, 3),
            stride,
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            conv_general_dilated=convolve_by_product if on_cpu else jax.lax.conv_general_dilated,
            rngs=rngs,
        )
        self.scale = nnx.Param(jnp.ones(n_out))
        self.bias = nnx.Param(jnp.zeros(n_out))

    def __call__(self, x_BHWC: jax.Array, normalize: Normalizer) -> jax.Array:
        scale, bias = (jax.lax.broadcast_to_rank(p[...], 4) for p in (self.scale, self.bias))
        return normalize(self.conv(x_BHWC)) * scale + bias


class Block(nnx.Module):
    """relu(x + conv(relu(conv(x)))); where the stride is 2, x is subsampled and its new channels are zero (option A)."""

    def __init__(self, n_in: int, n_out: int, stride: int, rngs: nnx.Rngs):
        self.stride, self.widen = stride, n_out - n_in
        self.first = ConvNorm(n_in, n_out, stride, rngs)
        self.second = ConvNorm(n_out, n_out, 1, rngs)

    def __call__(self, x_BHWC: jax.Array, normalize: Normalizer) -> jax.Array:
        y_BHWC = self.second(jax.nn.relu(self.first(x_BHWC, normalize)), normalize)
        x_BHWC = x_BHWC[:, :: self.stride, :: self.stride]
        return jax.nn.relu(y_BHWC + jnp.pad(x_BHWC, ((0, 0),) * 3 + ((0, self.widen),)))


class ResNet(nnx.Module):
    """Three stages of (depth - 2) / 6 blocks, of width, 2 width and 4 width channels, each half as large as the last.

    Raises ValueError if `depth` is not 6n + 2.
    """

    def __init__(self, depth: int, width: int, channels: int, classes: int, rngs: nnx.Rngs):
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"a ResNet of depth {depth}: must be 6n + 2, such as 8, 20 or 56")
        self.stem = ConvNorm(channels, width, 1, rngs)
        blocks, n_in = {}, width
        for stage in range(3):
            for i in range((depth - 2) // 6):
                n_out, stride = width * 2**stage, 2 if stage and not i else 1
                blocks[f"stage{stage}_block{i}"] = Block(n_in, n_out, stride, rngs)
                n_in = n_out
        self.blocks = nnx.Dict(blocks)
        self.head = nnx.Linear(n_in, classes, kernel_init=nnx.initializers.he_normal(), rngs=rngs)

    def __call__(
        self, x_BHWC: jax.Array, given: list[Moments] | None = None
    ) -> tuple[jax.Array, list[Moments]]:
        """Logits [B, N], and the moments that normalised each layer: `given`, or those of this batch."""
        normalize = Normalizer(given)
        x_BHWC = jax.nn.relu(self.stem(x_BHWC, normalize))
        for block in self.blocks.values():
            x_BHWC = block(x_BHWC, normalize)
        return self.head(x_BHWC.mean((1, 2))), normalize.used


def resnet_task(
    name: str,
    data_dir: str | None = None,
    hidden: int = 16,
    depth: int = 20,
    examples: int | None = None,
    calibration: tuple[int, int] = (16, 128),
) -> Task:
    """Classification by a ResNet, augmented as He et al. do; the score is the test error in [0, 1].

    Running averages of batch norm's moments would lag behind the parameters, and belong to no parameters at all where a
    method tests an average of its iterates (schedule-free). So a score takes the moments of `calibration` (batches, images
    in each) of augmented training images at the very parameters it is asked about (Wu and Johnson 2021, "precise" batch
    norm): it is a function of the parameters alone.
    """
    x, y = read_images(name, "train", data_dir, examples)
    x_test, y_test = map(jnp.asarray, read_images(name, "test", data_dir, examples))
    mean_C, std_C = (jnp.asarray(f(x / np.float32(255), (0, 1, 2))) for f in (np.mean, np.std))
    net = define(lambda rngs: ResNet(depth, hidden, x.shape[-1], int(y.max()) + 1, rngs))
    batches, size = calibration
    size = min(size, len(x))
    batches = min(batches, len(x) // size)
    seen = jnp.asarray(x[: batches * size].reshape(batches, size, *x.shape[1:]))

    def prepare(x_BHWC: jax.Array) -> jax.Array:
        mean, std = (jax.lax.broadcast_to_rank(m, 4) for m in (mean_C, std_C))
        return (x_BHWC / jnp.float32(255) - mean) / std

    def loss(params: Any, batch: dict, key: jax.Array) -> jax.Array:
        logits_BN, _ = net(params, augment(key, prepare(batch["x"])))
        return optax.softmax_cross_entropy_with_integer_labels(logits_BN, batch["y"]).mean()

    def score(params: Any) -> dict[str, jax.Array]:
        def moments_of(batch):
            key, x_BHWC = batch
            return net(params, augment(key, prepare(x_BHWC)))[1]

        keys = jax.random.split(jax.random.key(0), batches)
        moments = jax.tree.map(lambda m: m.mean(0), jax.lax.map(moments_of, (keys, seen)))

        def is_wrong(image):
            x_HWC, label = image
            logits_BN, _ = net(params, prepare(x_HWC[None]), moments)
            return logits_BN[0].argmax() != label

        wrong = jax.lax.map(is_wrong, (x_test, y_test), batch_size=min(250, len(y_test)))
        return {"error": wrong.mean()}

    return Task(name, net.init, loss, score, {"x": x, "y": y}, side_by_side=False)


def augment(key: jax.Array, x_BHWC: jax.Array) -> jax.Array:
    """Each image shifted by up to an eighth of its side (4 pixels of 32; zeros come in), and half of them flipped."""
    k_shift, k_flip = jax.random.split(key)
    B, H, W, _ = x_BHWC.shape
    reach = np.array([H // 8, W // 8])
    shift_B2 = jax.random.randint(k_shift, (B, 2), -reach[None], reach[None] + 1)
    flip_B = jax.random.bernoulli(k_flip, shape=(B,))

    @partial(jax.vmap)
    def move(x_HWC, shift_2, flip):
        padded = jnp.pad(x_HWC, ((reach[0],) * 2, (reach[1],) * 2, (0, 0)))
        x_HWC = jax.lax.dynamic_slice(padded, (*(shift_2 + reach), 0), x_HWC.shape)
        return jnp.where(flip, x_HWC[:, ::-1], x_HWC)

    return move(x_BHWC, shift_B2, flip_B)
