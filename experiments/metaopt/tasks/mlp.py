"""The paper's MNIST network (section 3.1): 784-128-10 with tanh after both layers, on pixels in [0, 1]."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.data import open_source, read, subset
from experiments.metaopt.grid import Task


def read_images(
    name: str, split: str, data_dir: str | None = None, examples: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(pixels u8 [N, H, W, C], labels i32 [N]) of a labelled data set: of all its images, or of `examples` random ones.

    Images without a label (-1) are left out.

    Raises ValueError or FileNotFoundError, with the remedy, where the data are not there or have no labels.
    """
    source = open_source(name, split, data_dir)
    if not {"image", "label"} <= source[0].keys():
        fields = ", ".join(source[0])
        raise ValueError(f"data {name!r} has no image with a label, but {fields}; try 'mnist'")
    source = subset(source, examples)
    records = read(source, range(len(source)))
    records = [r for r in records if r["label"] >= 0]
    if not records:
        raise ValueError(f"data {name!r} has no labels in its split {split!r}; try 'mnist'")
    labels = np.array([r["label"] for r in records], np.int32)
    return np.stack([r["image"] for r in records]), labels


def mlp_task(
    name: str, data_dir: str | None = None, hidden: int = 128, examples: int | None = None
) -> Task:
    """Classification by the paper's MLP; the score is the test error in [0, 1]."""
    if hidden < 1:
        raise ValueError(f"hidden={hidden}: the MLP has at least 1 hidden unit")
    x, y = _flat(*read_images(name, "train", data_dir, examples))
    x_test, y_test = map(jnp.asarray, _flat(*read_images(name, "test", data_dir)))
    widths = (x.shape[1], hidden, int(y.max()) + 1)

    def init(key: jax.Array) -> Any:
        """torch's default for linear layers, as in the paper: uniform in +-1/sqrt(inputs)."""
        params = {}
        for i, (n, m) in enumerate(itertools.pairwise(widths)):
            kernel, bias = jax.random.split(jax.random.fold_in(key, i))
            bound = n**-0.5
            params[f"layer{i}"] = {
                "kernel": jax.random.uniform(kernel, (n, m), minval=-bound, maxval=bound),
                "bias": jax.random.uniform(bias, (m,), minval=-bound, maxval=bound),
            }
        return params

    def logits(params: Any, x_BP: jax.Array) -> jax.Array:
        for layer in params.values():
            x_BP = jnp.tanh(x_BP @ layer["kernel"] + layer["bias"][None])
        return x_BP

    def loss(params: Any, batch: dict, key: jax.Array) -> jax.Array:
        scores_BC = logits(params, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(scores_BC, batch["y"]).mean()

    def score(params: Any) -> dict[str, jax.Array]:
        return {"error": (logits(params, x_test).argmax(-1) != y_test).mean()}

    return Task(name, init, loss, score, {"x": x, "y": y})


def _flat(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels f32 [N, H*W] in [0, 1] (of grey images; [N, H*W*C] of coloured ones), and the labels."""
    if (images == images[..., :1]).all():
        images = images[..., :1]
    return images.reshape(len(images), -1).astype(np.float32) / 255, labels
