"""The paper's MNIST network (section 3.1): 784-128-10 with tanh after both layers, on pixels in [0, 1]."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.data import open_source
from experiments.metaopt_grid import Task


def read_images(
    name: str, split: str, data_dir: str = "", examples: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(pixels f32 [N, H*W] in [0, 1], labels i32 [N]) of a grey data set such as "digits" or "mnist"."""
    source = open_source(name, split, data_dir or None)
    n = min(examples, len(source)) if examples else len(source)
    bulk = getattr(source, "__getitems__", None)
    records = bulk(range(n)) if bulk else [source[i] for i in range(n)]
    pixels = np.stack([r["image"][..., 0].reshape(-1) for r in records]).astype(np.float32) / 255
    return pixels, np.array([r["label"] for r in records], np.int32)


def mlp_task(name: str, data_dir: str = "", hidden: int = 128, examples: int = 0) -> Task:
    """Classification by the paper's MLP; the score is the test error in [0, 1]."""
    x, y = read_images(name, "train", data_dir, examples)
    x_test, y_test = map(jnp.asarray, read_images(name, "test", data_dir, examples))
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
            x_BP = jnp.tanh(x_BP @ layer["kernel"] + layer["bias"])
        return x_BP

    def loss(params: Any, batch: dict, key: jax.Array) -> jax.Array:
        scores_BC = logits(params, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(scores_BC, batch["y"]).mean()

    def score(params: Any) -> dict[str, jax.Array]:
        return {"error": (logits(params, x_test).argmax(-1) != y_test).mean()}

    return Task(name, init, loss, score, {"x": x, "y": y})
