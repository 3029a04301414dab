"""How long a training is, how often it does what, and which meshes, batches and saved states that allows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from common.config import ConfigError
from common.sharding import BATCH_AXES, batch_ways, path_name


@dataclass(frozen=True)
class TrainSpec:
    """How long and how often.

    Attributes:
      steps: updates in all.  batch: global batch size.  seed: seed of parameters, data order, masks and noise.
      log_every: steps between rows of metrics; 0 for the last step alone.
      eval_every: steps between evaluations; 0 for the last step alone.
      save_every: steps between checkpoints; 0 for the last step alone.
      accumulate: microbatches per update.
      steps_per_dispatch: updates in one program, between which the host does nothing; the numbers are those of 1.
      profile_start: first step traced into <workdir>/profile.  profile_steps: steps traced; 0 for none.
    """

    steps: int
    batch: int
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 500
    accumulate: int = 1
    steps_per_dispatch: int = 1
    profile_start: int = 10
    profile_steps: int = 0

    def __post_init__(self):
        if min(self.steps, self.batch, self.accumulate, self.steps_per_dispatch) < 1:
            positive = "train.steps, train.batch, train.accumulate and train.steps_per_dispatch"
            raise ValueError(f"{positive} must be at least 1")
        hooks = ("log_every", "eval_every", "save_every", "profile_start", "profile_steps")
        if negative := [f"train.{n}={getattr(self, n)}" for n in hooks if getattr(self, n) < 0]:
            raise ValueError(f"{', '.join(negative)} must not be negative")
        if self.batch % self.accumulate:
            raise ValueError(
                f"train.batch={self.batch} does not divide into train.accumulate={self.accumulate} microbatches"
            )

        if not self.profile_steps:
            hooks = hooks[:3]
        each = self.steps_per_dispatch
        if odd := [f"{n}={v}" for n in ("steps", *hooks) if (v := getattr(self, n)) % each]:
            raise ValueError(
                f"steps_per_dispatch={each} does not divide {', '.join(odd)}: change these, or set it to 1"
            )

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises ValueError unless every microbatch spreads evenly over the mesh."""
        shards = batch_ways(mesh)
        if (self.batch // self.accumulate) % shards:
            parts = f" in {self.accumulate} microbatches" if self.accumulate > 1 else ""
            axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH_AXES)
            raise ValueError(
                f"train.batch={self.batch}{parts} does not divide over the mesh's {axes}: use a multiple of "
                f"{shards * self.accumulate}"
            )

    def check_rows(self, batch: Any) -> None:
        """Raises ValueError unless every leaf of `batch` has the rows of the whole global batch."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            if leaf.shape[:1] != (self.batch,):
                raise ValueError(
                    f"batch[{path_name(path)!r}] has the shape {leaf.shape}, but train.batch={self.batch}: `batches` must "
                    "give the whole global batch (common.data.prefetch_to_device joins it from every process's rows)"
                )

    def check_restored(self, step: int, workdir: Path) -> None:
        """Raises ConfigError unless a run can go on from a state of this step, saved in `workdir`."""
        if step > self.steps:
            raise ConfigError(
                f"{workdir} has trained {step} steps, more than train.steps={self.steps}: raise it, or take another workdir"
            )
        if step % (each := self.steps_per_dispatch):
            raise ConfigError(
                f"{workdir} is at step {step}, which train.steps_per_dispatch={each} does not divide: set it to 1"
            )
