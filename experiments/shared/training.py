"""A training in a folder: checkpoints, rows and curves. What every paper's training job does the same way."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from common.checkpoint import Checkpointer, CheckpointSpec
from common.cpu_heap import set_fragments_aside
from common.data import prefetch_to_device
from common.nn.ops import compiler_options
from common.plots import draw_curves
from common.recipe import Recipe
from common.sharding import batch_sharding
from common.train_loop import TrainSpec, train
from common.train_step import AS_IT_IS, Prepare, Program
from common.writers import make_writer


def train_in(
    workdir: Path,
    recipe: Recipe,
    spec: TrainSpec,
    *,
    mesh: Mesh,
    host_batches: Callable[[int], Iterator[dict]],
    meta: Mapping[str, Any],
    writer: Mapping[str, Any],
    checkpoint: CheckpointSpec = CheckpointSpec(),
    before_rows: Callable[[int], None] = lambda step: None,
    prepare: Prepare = AS_IT_IS,
    **evals: Any,
) -> tuple[Any, dict[str, float]]:
    """Trains or goes on with it: (final state, ledger seconds). Raises as `common.train_loop.train`.

    Args:
      host_batches: from a start step to the batches of this process's rows.
      writer: `make_writer`'s items_per_step, unit, and what else it takes.
      before_rows: called with the restored step (-1: none) before a row is written.
      evals: `train`'s `evals` and `evaluate_again`.
    """

    def batches(start: int) -> Iterator[dict]:
        depth = max(2, spec.steps_per_dispatch)
        return prefetch_to_device(
            host_batches(start), batch_sharding(mesh), depth, batch=spec.batch
        )

    def open_writer(step: int):
        before_rows(step)
        return make_writer(workdir, spec.steps, restored_step=step, **writer)

    try:
        with Checkpointer(workdir / "checkpoints", checkpoint) as saver:
            return train(
                recipe,
                spec,
                mesh=mesh,
                batches=batches,
                open_writer=open_writer,
                checkpointer=saver,
                workdir=workdir,
                meta=meta,
                program=Program(prepare, compiler_options(mesh), set_fragments_aside),
                **evals,
            )
    finally:
        draw_curves(workdir)
