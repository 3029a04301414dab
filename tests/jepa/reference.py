"""I-JEPA in float64 NumPy, written from the paper's description alone (docs/papers/ijepa.md 1.0 to 1.4).

It reads our parameter trees and shares no code with the package: one image, one sequence and one
head at a time, with no padding. A padded batch is given as the lists of its valid indices.
"""

import math

import numpy as np

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406])
IMAGENET_STD = np.array([0.229, 0.224, 0.225])


def linear(p, x):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)


def standardise(x, eps):
    """Zero mean and unit variance over the features of every token."""
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps)


def layer_norm(p, x):
    scale, bias = np.asarray(p["scale"], np.float64), np.asarray(p["bias"], np.float64)
    return standardise(x, 1e-6) * scale + bias


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(p, x, heads):
    """x: [tokens, width]. The joint projection's columns are ordered (q, k, v), head, head width."""
    size = x.shape[1] // heads
    q, k, v = np.split(linear(p["qkv"], x), 3, axis=1)
    mixed = np.zeros_like(x)
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        scores = q[:, columns] @ k[:, columns].T / math.sqrt(size)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        mixed[:, columns] = weights @ v[:, columns]
    return linear(p["out"], mixed)


def transformer(stack, x, heads):
    """Pre-norm blocks; every leaf of `stack` has the layers in front."""

    def layer(tree, i):
        return {k: layer(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}

    for i in range(len(stack["norm1"]["scale"])):
        p = layer(stack, i)
        x = x + attention(p["attention"], layer_norm(p["norm1"], x), heads)
        x = x + linear(p["mlp"]["down"], gelu(linear(p["mlp"]["up"], layer_norm(p["norm2"], x))))
    return x


def positions(rows, cols, width):
    """[rows * cols, width]: column then row, each all sines then all cosines."""
    table = np.zeros((rows * cols, width))
    quarter = width // 4
    for row in range(rows):
        for col in range(cols):
            for k in range(quarter):
                omega = 10000 ** (-k / quarter)
                table[row * cols + col, k] = math.sin(col * omega)
                table[row * cols + col, quarter + k] = math.cos(col * omega)
                table[row * cols + col, 2 * quarter + k] = math.sin(row * omega)
                table[row * cols + col, 3 * quarter + k] = math.cos(row * omega)
    return table


def patches(image, size):
    """[rows * cols, size * size * channels] of one image [H, W, C], in raster order."""
    rows, cols = image.shape[0] // size, image.shape[1] // size
    return np.stack(
        [
            image[r * size : (r + 1) * size, c * size : (c + 1) * size].reshape(-1)
            for r in range(rows)
            for c in range(cols)
        ]
    )


def encode(params, config, image, keep=None):
    """Tokens [N, D] of one normalised image, or [len(keep), D] when only `keep` enters attention."""
    x = linear(params["patch"]["proj"], patches(np.asarray(image, np.float64), config.patch))
    x = x + positions(*config.grid, config.width)
    if keep is not None:
        x = x[keep]
    return layer_norm(params["norm"], transformer(params["blocks"], x, config.heads))


def predict(params, config, z, context, target, noise=None):
    """Features [T, D] at the grid indices `target`, from context tokens z [C, D] at `context`.

    noise: StoP's n [T, D], which A (the input projection, without its bias) takes to the width.
    """
    table = positions(*config.grid, config.predictor_width)
    masks = np.asarray(params["mask_token"], np.float64) + table[target]
    if noise is not None:
        masks = masks + noise @ np.asarray(params["embed"]["kernel"], np.float64)
    x = np.concatenate([linear(params["embed"], z) + table[context], masks])
    x = transformer(params["blocks"], x, config.predictor_heads or config.heads)
    return linear(params["proj"], layer_norm(params["norm"], x[len(context) :]))


def normalise(image):
    """uint8 [H, W, 3] to ImageNet's zero mean and unit deviation."""
    return (np.asarray(image, np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD


def smooth_l1(difference):
    size = np.abs(difference)
    return np.where(size < 1, size**2 / 2, size - 1 / 2)


def loss(params, target_params, config, images, contexts, targets, distance=smooth_l1):
    """The mean distance over every image, block, token and feature.

    contexts: one index list per image. targets: one list of index lists per image.
    """
    errors = []
    for image, context, blocks in zip(images, contexts, targets):
        image = normalise(image)
        h = standardise(encode(target_params, config, image), 1e-5)  # its own norm, then this one
        z = encode(params["encoder"], config, image, context)
        for block in blocks:
            predicted = predict(params["predictor"], config, z, context, block)
            errors.append(distance(predicted - h[block]).ravel())
    return np.concatenate(errors).mean()


def vicreg(context, target):
    """VICReg's three terms of pooled embeddings [B, D] (Bardes et al., 2022), entry by entry."""
    batch, width = context.shape
    centred = context - context.mean(0)
    variance = covariance = 0.0
    for i in range(width):
        deviation = math.sqrt((centred[:, i] ** 2).sum() / (batch - 1) + 1e-4)
        variance += max(0.0, 1 - deviation) / width
        for j in range(width):
            if i != j:
                covariance += ((centred[:, i] @ centred[:, j]) / (batch - 1)) ** 2 / width
    invariance = ((context - target) ** 2).mean()
    return {"variance": variance, "covariance": covariance, "invariance": invariance}
