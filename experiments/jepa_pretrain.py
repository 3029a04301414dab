"""Job "jepa_pretrain": I-JEPA from images to probe, in one workdir.

The workdir gets config.json, metrics.jsonl (one row per logged step), curves.png, checkpoints/, and result.json (one
row with everything needed to run it again).
"""

import dataclasses
import importlib.util
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from common.checkpoint import Checkpointer, CheckpointSpec
from common.config import ConfigError, build
from common.data import (
    LoaderSpec,
    fingerprint,
    prefetch_to_device,
    train_batches,
)
from common.distributed import EXIT_PREEMPTED
from common.mesh import auto_mesh, make_mesh
from common.plots import curves
from common.results import append_row, make_row
from common.sharding import batch_sharding
from common.state import state_shardings
from common.train_loop import NonFiniteLoss, Preempted, train
from common.writers import make_writer, read_rows
from experiments.jepa_data import Sets, check_sets, open_sets
from experiments.jepa_eval import encode_fn, linear_probes, online_monitor
from experiments.jepa_settings import DataSettings, Settings, resolve
from jepa.recipe import AddMasks

log = logging.getLogger("triptych")


def run(values: dict[str, Any], workdir: Path) -> int:
    """Runs the job; see experiments/launch.py for what it prints and returns."""
    began = time.perf_counter()
    settings, sets, mesh = begin(values, workdir)
    source = sets.train
    recipe, spec = settings.recipe, settings.train
    try:
        _check_writers(settings)
        spec.check_mesh(mesh)
        abstract, _ = state_shardings(recipe, mesh)
        loader = LoaderSpec(
            spec.batch,
            spec.seed,
            workers=settings.data.workers,
            process=jax.process_index(),
            num_processes=jax.process_count(),
        )
        keep = CheckpointSpec(settings.checkpoint.keep)
        add_masks = AddMasks(recipe.masks, spec.seed)
        data_print = fingerprint(source, loader, settings.augmentation, add_masks)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    workdir.mkdir(parents=True, exist_ok=True)
    _describe(settings, len(source), mesh, abstract.params)

    def batches(start: int) -> Iterator[dict]:
        host = train_batches(
            source,
            loader,
            transform=settings.augmentation,
            batch_transform=add_masks,
            start_step=start,
        )
        return prefetch_to_device(host, batch_sharding(mesh))

    def open_writer(restored_step: int):
        _write_json(
            workdir / "config.json", settings.values
        )  # a config that is refused leaves none
        return make_writer(
            workdir,
            spec.steps,
            restored_step=restored_step,
            items_per_step=spec.batch,
            unit="images",
            tensorboard=settings.writers.tensorboard,
            wandb={"project": "triptych", "run_id": workdir.name}
            if settings.writers.wandb
            else None,
        )

    try:
        with Checkpointer(workdir / "checkpoints", keep) as saver:
            state, _ = train(
                recipe,
                spec,
                mesh=mesh,
                batches=batches,
                open_writer=open_writer,
                checkpointer=saver,
                workdir=workdir,
                meta={"config": settings.values, "data": data_print},
                evals={"eval": online_monitor(settings, auto_mesh(mesh), sets.bank, sets.test)},
            )
    except Preempted as stop:
        log.warning("%s; start the same command again to continue", stop)
        return EXIT_PREEMPTED
    except NonFiniteLoss as error:
        log.error("error: %s", error)
        return 1
    finally:
        if (workdir / "metrics.jsonl").exists() and jax.process_index() == 0:
            curves(read_rows(workdir / "metrics.jsonl"), workdir / "curves.png")

    metrics = _last_eval(workdir)
    if settings.probe.linear:
        log.info("linear probe on frozen features of the target encoder")
        encode = encode_fn(recipe.encoder, state.extra["target"])
        metrics |= linear_probes(settings, auto_mesh(mesh), encode, sets.bank, sets.test)
    if jax.process_index() == 0:
        row = make_row(
            job="jepa_pretrain",
            config=settings.name,
            metrics=metrics,
            seeds=[spec.seed],
            steps=spec.steps,
            wall_seconds=time.perf_counter() - began,
            resolved=settings.values,
        )
        _write_json(workdir / "result.json", dataclasses.asdict(row))
        append_row(workdir / "results.jsonl", row)
        log.info("\n".join(f"  {name:28s} {value:8.4f}" for name, value in metrics.items()))
        log.info("wrote %s", workdir / "result.json")
    return 0


def begin(values: dict[str, Any], workdir: Path) -> tuple[Settings, Sets, Mesh]:
    """A config's settings, its sets of images, and its mesh, for a job that writes into `workdir`.

    Raises:
      ConfigError: for whatever is wrong with them.
    """
    if "://" in str(workdir) or str(workdir).startswith("gs:/"):
        raise ConfigError(
            f"--workdir={workdir}: rows and curves need a file system; mount the bucket, or use a shared folder"
        )
    try:
        sets = open_sets(build(DataSettings, values["data"], "config.data."))
        settings = resolve(values, len(sets.train))
        check_sets(settings, sets)
        return settings, sets, make_mesh(settings.mesh)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error


def _check_writers(settings: Settings) -> None:
    for name, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if getattr(settings.writers, name) and importlib.util.find_spec(module) is None:
            raise ConfigError(f"config.writers.{name}=True needs {module}: pip install '.[{name}]'")


def _describe(settings: Settings, examples: int, mesh: Mesh, params: dict) -> None:
    model, masks = settings.recipe.model, settings.recipe.masks
    count = {k: sum(p.size for p in jax.tree.leaves(v)) / 1e6 for k, v in params.items()}
    log.info(
        "%s: %d images, encoder %.2f M + predictor %.2f M parameters, grid %dx%d, context %d tokens, %d targets of up "
        "to %d, mesh %s, %d steps of %d",
        settings.name, examples, count["encoder"], count["predictor"], *model.grid, masks.context_size,
        masks.num_targets, masks.target_size, dict(mesh.shape), settings.train.steps, settings.train.batch,
    )  # fmt: skip


def _last_eval(workdir: Path) -> dict[str, float]:
    """The last row of online evaluation, without its prefix."""
    rows = [
        r for r in read_rows(workdir / "metrics.jsonl") if any(k.startswith("eval/") for k in r)
    ]
    return (
        {k.removeprefix("eval/"): v for k, v in rows[-1].items() if k.startswith("eval/")}
        if rows
        else {}
    )


def _write_json(path: Path, value: Any) -> None:
    if jax.process_index() == 0:
        path.write_text(json.dumps(value, indent=2) + "\n")
