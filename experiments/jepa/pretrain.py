"""Job "jepa_pretrain": I-JEPA from images to probe, in one workdir.

The workdir gets config.json, metrics.jsonl (one row per logged step), curves.png, checkpoints/, and result.json (one
row with everything needed to run it again).
"""

import importlib.util
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jax.tree_util import Partial

from common.checkpoint import read_meta
from common.config import ConfigError, build
from common.data import (
    LoaderSpec,
    drawn_records,
    fingerprint,
    images_on_device,
    train_batches,
)
from common.distributed import Signalled, require_same, stopped_by_signals
from common.evaluation import EvaluationFailed, describe
from common.mesh import auto_mesh, make_mesh
from common.sharding import batch_sharding, rows_held
from common.state import state_shardings
from common.train_loop import Preempted
from common.train_step import AS_IT_IS, Prepare
from common.writers import read_metrics
from experiments.jepa.data import Sets, check_sets, open_sets
from experiments.jepa.probes import encode_fn, linear_probes, online_monitor
from experiments.jepa.settings import DataSettings, Settings, WriterSettings, resolve
from experiments.shared.facts import data_facts
from experiments.shared.run import Run, job, within
from experiments.shared.training import train_in
from jepa.recipe import AddMasks

log = logging.getLogger("triptych")

# Settings of evaluations alone: they may change, on purpose, when all steps are done, and all is measured again.
EVALUATIONS = ("probe", "data.test_split", "data.probe_split", "data.eval_resize")


@job(Settings)
def run(run: Run) -> int:
    """Runs the job; see experiments/launch.py for what it prints and returns."""
    settings, sets, mesh = open_run(run.values)
    recipe, spec = settings.recipe, settings.train
    try:
        loader, add_masks, data_print = _stream(settings, sets, mesh)
        prepare = _prepare(settings, sets, mesh)
        _describe(run, settings, len(sets.train), mesh)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error

    meta = {"config": run.values, "data": data_print, "sets": _measured_on(sets)}

    def before_rows(restored_step: int) -> None:
        _check_resumed(run, restored_step, spec.steps, meta)
        run.begin(None if restored_step < 0 else restored_step)

    state, seconds = train_in(
        run.workdir,
        recipe,
        spec,
        mesh=mesh,
        host_batches=partial(_host_batches, settings, sets, loader, add_masks),
        meta=meta,
        writer={
            "items_per_step": spec.batch,
            "unit": "images",
            "tensorboard": settings.writers.tensorboard,
            "wandb": _wandb(settings.writers, run.values),
        },
        checkpoint=settings.checkpoint,
        before_rows=before_rows,
        prepare=prepare,
        evals={"eval": online_monitor(settings, auto_mesh(mesh), sets.bank, sets.test)},
        evaluate_again=run.resume == "changed",
    )
    return _finish(run, settings, sets, mesh, state, seconds)


def _host_batches(
    settings: Settings, sets: Sets, loader: LoaderSpec, add_masks: AddMasks, start: int
) -> Iterator[dict]:
    """This process's batches from step `start`; with data.on_device, the numbers of their records alone."""
    if settings.data.on_device:
        return drawn_records(sets.train, loader, start)
    augment = settings.augmentation
    return train_batches(
        sets.train, loader, transform=augment, batch_transform=add_masks, start_step=start
    )


def _stream(
    settings: Settings, sets: Sets, mesh: Mesh
) -> tuple[LoaderSpec, AddMasks, dict[str, Any]]:
    """How training batches are drawn, what adds the masks, and the fingerprint of both, which all processes share."""
    spec = settings.train
    loader = LoaderSpec(
        spec.batch,
        spec.seed,
        workers=settings.data.workers,
        held=rows_held(batch_sharding(mesh), spec.batch),
    )
    add_masks = AddMasks(settings.recipe.masks, spec.seed)
    transforms = (
        [device] if (device := settings.device_batch) else [settings.augmentation, add_masks]
    )
    data_print = fingerprint(sets.train, loader, *transforms)
    require_same(data_facts(training=data_print, test=fingerprint(sets.test, loader)))
    return loader, add_masks, data_print


def _prepare(settings: Settings, sets: Sets, mesh: Mesh) -> Prepare:
    """What the step does with what the input pipeline gives: nothing, or with data on the device all of it."""
    if not (device := settings.device_batch):
        return AS_IT_IS
    log.info("moving %d images to the device ...", len(sets.train))
    return Partial(device, images_on_device(sets.train, mesh))


def _measured_on(sets: Sets) -> dict[str, Any]:
    """The sets of the evaluations, as JSON gives them back: a run refuses a change of these."""
    named = {"bank": sets.bank, "test": sets.test}
    prints = {k: {**getattr(v, "identity", {}), "length": len(v)} for k, v in named.items()}
    return json.loads(json.dumps(prints))


def _check_resumed(run: Run, step: int, steps: int, meta: Mapping[str, Any]) -> None:
    """Refuses settings that would reach the row, but neither the training nor the evaluations that are left.

    Raises:
      ConfigError: with the remedy.
    """
    if step < 0:  # nothing was restored
        return
    unused = [name for name in run.changed if not within(name, (*EVALUATIONS, "name"))]
    if step >= steps and unused:
        raise ConfigError(
            f"{run.workdir} is trained to its end, step {step}: {', '.join(unused)} would change nothing but its row. Raise "
            "config.train.steps, or take another --workdir"
        )
    saved = read_meta(run.workdir / "checkpoints").get("sets", meta["sets"])
    changed = [k for k in meta["sets"] if saved.get(k) != meta["sets"][k]]
    if changed and run.resume == "same":
        lines = [f"  {k}: saved {saved.get(k)}, now {meta['sets'][k]}" for k in changed]
        raise ConfigError(
            "\n".join([f"{run.workdir} was evaluated on other images:", *lines,
                       "Take another --workdir, or go on with these on purpose: --resume=changed"])
        )  # fmt: skip


def _finish(
    run: Run, settings: Settings, sets: Sets, mesh: Mesh, state: Any, seconds: Mapping[str, float]
) -> int:
    """Probes the trained encoder and writes the row. A probe that fails is repeated, alone, by the same command."""
    recipe, metrics = settings.recipe, _last_eval(run.workdir)
    if settings.probe.linear:
        log.info("linear probe on frozen features of the target encoder")
        encode, probing = encode_fn(recipe.encoder, state.extra["target"]), time.perf_counter()
        try:
            with stopped_by_signals():
                metrics |= linear_probes(settings, auto_mesh(mesh), encode, sets.bank, sets.test)
        except Signalled as stop:
            raise Preempted(
                "stopped by a signal in the probes; the trained state is saved"
            ) from stop
        except Exception as error:  # any: the training before it must not look lost
            why = describe(error, "linear probes", run.workdir)
            raise EvaluationFailed(
                f"the linear probes failed: {why}; the trained state is saved: fix that and start the same command again, "
                "which repeats only this"
            ) from error
        seconds = {**seconds, "probe": time.perf_counter() - probing}
    row = run.row(
        metrics, seeds=[settings.train.seed], steps=settings.train.steps,
        mesh=dict(mesh.shape), dtype=recipe.policy.compute, seconds=seconds,
    )  # fmt: skip
    if jax.process_index() == 0:
        log.info("\n".join(f"  {name:28s} {value:8.4f}" for name, value in metrics.items()))
        log.info("seconds: %s", ", ".join(f"{k} {v:.1f}" for k, v in seconds.items()))
    run.finish(row)
    return 0


def open_run(values: dict[str, Any]) -> tuple[Settings, Sets, Mesh]:
    """A config's settings, its sets of images, and its mesh, checked against each other.

    Raises:
      ConfigError: something is wrong with them.
    """
    try:
        sets = open_sets(build(DataSettings, values["data"], "config.data."))
        settings = resolve(values, len(sets.train))
        check_sets(settings, sets)
        _check_writers(settings)
        settings.train.check_mesh(mesh := make_mesh(settings.mesh))
        return settings.on(mesh), sets, mesh
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error


def _check_writers(settings: Settings) -> None:
    for name, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if getattr(settings.writers, name) and importlib.util.find_spec(module) is None:
            raise ConfigError(f"config.writers.{name}=True needs {module}: pip install '.[{name}]'")


def _wandb(writers: WriterSettings, values: dict[str, Any]) -> dict[str, Any] | None:
    """What W&B is told of the run; None where it is off."""
    if not writers.wandb:
        return None
    project = writers.wandb_project or os.environ.get("WANDB_PROJECT") or "triptych"
    return {"project": project, "config": values}


def _describe(run: Run, settings: Settings, examples: int, mesh: Mesh) -> None:
    if "data.examples" in run.overrides:
        log.warning(
            "config.data.examples=%d is what preflight counts on; this set has %d images, and all are used",
            settings.data.examples, examples,
        )  # fmt: skip
    model, masks = settings.recipe.model, settings.recipe.masks
    params = state_shardings(settings.recipe, mesh)[0].params
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
        r for r in read_metrics(workdir / "metrics.jsonl") if any(k.startswith("eval/") for k in r)
    ]
    return (
        {k.removeprefix("eval/"): v for k, v in rows[-1].items() if k.startswith("eval/")}
        if rows
        else {}
    )
