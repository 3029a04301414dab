"""One model on any number of devices: rules turn the names of its axes into shardings.

    python examples/train_on_a_mesh.py
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/train_on_a_mesh.py

Trains a small language model on the bytes of Python's manual. The losses are the same on 1 device and on 8.
"""

import jax
import numpy as np

from common.mesh import MeshSpec, make_mesh
from common.metrics import compute
from common.optim import OptimSpec, adamw
from common.sharding import PARAM_RULES, batch_sharding, path_name, replicated
from common.state import init_sharded, state_shardings
from common.train_step import make_train_step
from sinks.config import ModelConfig
from sinks.recipe import LanguageModel
from sinks.text import documents

STEPS, BATCH, LENGTH = 60, 16, 64
HEADS = {"heads": 4, "kv_heads": 4, "head_dim": 16}
SIZES = {"vocab_size": 256, "width": 64, "depth": 2, "mlp_dim": 256, "max_positions": LENGTH}


def main() -> None:
    # Parameters and batch are split over "fsdp"; heads and hidden units over "tensor".
    mesh = make_mesh(MeshSpec(fsdp=-1, tensor=1 if len(jax.devices()) % 2 else 2))
    print(f"mesh: {dict(mesh.shape)}\nrules: {dict(PARAM_RULES)}")

    model = ModelConfig(family="llama", **SIZES, **HEADS)
    recipe = LanguageModel(model, adamw(OptimSpec(lr=3e-3, warmup=STEPS // 6), STEPS))
    abstract, sharding = state_shardings(recipe, mesh)
    for path, shape in jax.tree_util.tree_leaves_with_path(abstract.params["blocks"]):
        name = path_name(path)
        print(f"  {name:12s} {shape.shape!s:14s} -> {sharding.params['blocks'][name].spec}")

    state = init_sharded(recipe, jax.random.key(0), sharding)  # each shard on its own device
    step = jax.jit(
        make_train_step(recipe),
        in_shardings=(sharding, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(sharding, replicated(mesh)),
        donate_argnums=0,
    )
    text = np.frombuffer(documents("python-topics")[0].text.encode(), np.uint8).astype(np.int32)
    for i in range(STEPS):  # a batch is a function of the step
        starts = np.random.default_rng(i).integers(len(text) - LENGTH, size=BATCH)
        tokens = text[starts[:, None] + np.arange(LENGTH)]
        batch = jax.device_put({"tokens": tokens}, batch_sharding(mesh))
        state, metrics = step(state, batch, np.int32(i))
        loss = compute(metrics)["loss"]  # waits: virtual devices run one step at a time
        if i % 10 == 0 or i + 1 == STEPS:
            print(f"step {i + 1}: {loss:.4f} nats a byte", flush=True)


if __name__ == "__main__":
    main()
