"""Small trainings, the same for one process and for several. Where they run, `devices` tells."""

import itertools
import json

import jax
import numpy as np

from common.checkpoint import Checkpointer
from common.data import LoaderSpec, array_source, prefetch_to_device, train_batches
from common.mesh import MeshSpec, make_mesh
from common.sharding import batch_sharding, rows_held, to_host
from common.train_loop import TrainSpec, train
from common.writers import make_writer, read_metrics
from experiments.shared.run import Run
from experiments.sinks import pretrain as sinks_pretrain
from experiments.sinks.configs.pretrain import get_config
from jepa.recipe import AddMasks
from tests.jepa.test_meshes import recipe

SPEC = LoaderSpec(batch=8, seed=3)


def with_rows(batch, rows):
    return {**batch, "row": rows}


def source():
    return array_source(x=np.random.default_rng(0).integers(0, 1000, (50, 2)))


def batches(mesh, start=0, spec=SPEC, source=source, transform=with_rows):
    rows = batch_sharding(mesh)
    spec = LoaderSpec(spec.batch, spec.seed, held=rows_held(rows, spec.batch))
    host = train_batches(source(), spec, batch_transform=transform, start_step=start)
    return prefetch_to_device(host, rows, batch=spec.batch)


def shards(mesh):
    """What this process's devices hold of three batches: (first row, name, values of a shard)."""
    with batches(mesh) as device_batches:
        return [
            (step, name, shard.index[0].indices(SPEC.batch)[0], np.asarray(shard.data).tolist())
            for step, batch in enumerate(itertools.islice(device_batches, 3))
            for name, array in batch.items()
            for shard in array.addressable_shards
        ]


def images():
    return array_source(
        image=np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    )


def train_ijepa(sizes, workdir, devices=None):
    """Three steps of I-JEPA by the real loop on a mesh of these sizes: (losses, a sum over each parameter)."""
    method, mesh = recipe(), make_mesh(MeshSpec(*sizes), devices)
    spec = TrainSpec(steps=3, batch=16, log_every=1)
    loader = LoaderSpec(spec.batch, spec.seed)
    with Checkpointer(workdir / "checkpoints") as saver:
        state, _ = train(
            method,
            spec,
            mesh=mesh,
            batches=lambda start: batches(
                mesh, start, loader, images, AddMasks(method.masks, spec.seed)
            ),
            open_writer=lambda step: make_writer(
                workdir, spec.steps, restored_step=step, items_per_step=16, unit="images"
            ),
            checkpointer=saver,
            workdir=workdir,
            meta={},
        )
    params = jax.tree.leaves(to_host(state.params))
    losses = [row["loss"] for row in read_metrics(workdir / "metrics.jsonl")]
    return losses, [float(np.abs(p).sum()) for p in params]


def pretrain_sinks(workdir):
    """The job with one variant, whose stream is not measured, but its parameters: each process does that by itself."""

    def measure(recipe, params, settings, held_out):
        assert all(isinstance(p, np.ndarray) for p in jax.tree.leaves(params))
        total = float(sum(np.abs(p).sum() for p in jax.tree.leaves(params)))
        return {name: total for name in settings.specs()}

    sinks_pretrain.measure = measure
    values = get_config("smoke").to_dict()
    values["variants"] = ("vanilla",)
    values["train"] |= {"steps": 2, "save_every": 0}
    values["model"] |= {"depth": 1}
    values["mesh"] |= {"fsdp": 2, "tensor": 2}
    assert sinks_pretrain.run(Run(values, workdir)) == 0


def metrics(workdir):
    return json.loads((workdir / "result.json").read_text())["metrics"]
