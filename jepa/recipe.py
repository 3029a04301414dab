"""I-JEPA pretraining in the paper's order: masks, targets, context, prediction, AdamW, EMA (docs/papers/ijepa.md 1)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.metrics import Metrics
from common.nn.layers import LOGICAL_AXES
from common.nn.ops import Policy
from common.optim import Log
from common.schedules import Schedule, linear
from common.sharding import logical_axes
from jepa.config import ViTConfig
from jepa.encoder import Encoder
from jepa.masks import MaskSpec, assert_disjoint, sample
from jepa.objective import ObjectiveSpec, ijepa_loss
from jepa.predictor import Predictor

# The predictor's own parameters; its blocks are the shared layers.
AXES = LOGICAL_AXES | {
    "predictor/embed/kernel": ("embed", "predictor"),
    "predictor/embed/bias": (None,),
    "predictor/mask_token": (None,),
    "predictor/proj/kernel": ("predictor", "embed"),
}


@dataclass(frozen=True)
class EmaSpec:
    """The EMA encoder's momentum, linear over the run; constant if both are equal (docs/papers/ijepa.md 6.2).

    Attributes:
      start: momentum at the first update.  final: momentum at the last.
    """

    start: float = 0.996
    final: float = 1.0

    def __post_init__(self):
        if not 0 <= self.start <= self.final <= 1:
            raise ValueError(
                f"ema needs 0 <= start <= final <= 1, got {self.start} and {self.final}"
            )

    def schedule(self, steps: int) -> Schedule:
        """The momentum over `steps` updates."""
        return linear(self.start, self.final, steps)


@dataclass(frozen=True)
class IJepa:
    """The recipe the train loop runs (protocol: common/recipe.py).

    `extra` holds {"target": the EMA encoder's parameters}, which evaluations use.

    Attributes:
      tx: the optimizer.  log_tx: what the log shows of it (common/optim.py).
      momentum: the target encoder's, by update count (`EmaSpec.schedule`).
    """

    model: ViTConfig
    masks: MaskSpec
    tx: optax.GradientTransformation
    momentum: Schedule
    objective: ObjectiveSpec = ObjectiveSpec()
    policy: Policy = Policy()
    log_tx: Log = lambda opt_state, step: {}

    def __post_init__(self):
        if self.masks.grid != self.model.grid:
            raise ValueError(
                f"masks are for grid {self.masks.grid}, the model's is {self.model.grid}"
            )

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.model, self.policy)

    @cached_property
    def predictor(self) -> Predictor:
        return Predictor(self.model, self.policy, self.objective.position_noise)

    def init(self, key: jax.Array) -> dict:
        k_encoder, k_predictor = jax.random.split(key)
        return {
            "encoder": self.encoder.init(k_encoder),
            "predictor": self.predictor.init(k_predictor),
        }

    def init_extra(self, params: dict) -> dict:
        return {"target": jax.tree.map(jnp.copy, params["encoder"])}

    def loss(
        self, params: dict, extra: dict, batch: dict, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        return ijepa_loss(
            self.encoder, self.predictor, self.objective, params, extra["target"], batch, key
        )

    def update_extra(self, extra: dict, params: dict, step: jax.Array) -> dict:
        """The EMA, after the optimizer: target <- m target + (1 - m) encoder."""
        m = self.momentum(step)
        target = jax.tree.map(lambda t, p: m * t + (1 - m) * p, extra["target"], params["encoder"])
        return {"target": target}

    def param_axes(self, abstract: Any) -> Any:
        return logical_axes(abstract, AXES)

    def extra_axes(self, abstract: Any) -> Any:
        return logical_axes(abstract, AXES)

    def log(self, opt_state: Any, step: jax.Array) -> dict[str, jax.Array]:
        return self.log_tx(opt_state, step) | {"ema": self.momentum(step)}

    def batch_shapes(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch, for compiling without data."""
        B, M = batch, self.masks.num_targets
        C, T = self.masks.context_size, self.masks.target_size
        shapes = {
            "image": ((B, *self.model.image, self.model.channels), jnp.uint8),
            "context": ((B, C), jnp.int32),
            "targets": ((B, M, T), jnp.int32),
            "target_valid": ((B, M, T), jnp.bool_),
        }
        if self.masks.mode == "paper":
            shapes["context_valid"] = ((B, C), jnp.bool_)
        return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class AddMasks:
    """Batch transform of the input pipeline: draws each row's masks from (seed, global row)."""

    spec: MaskSpec
    seed: int

    def __repr__(self) -> str:
        """As checkpoints of version 0.1 hold it in the fingerprint of their data, with 0 where nothing is set."""
        text = f"AddMasks(spec={self.spec}, seed={self.seed})"
        return text.replace("context_tokens=None", "context_tokens=0")

    def __call__(self, batch: dict, rows: np.ndarray) -> dict:
        masks = sample(self.spec, self.seed, rows)
        if self.spec.mode == "fixed":  # the released rules give way on grids too small for them
            assert_disjoint(masks)
        batch = {
            "image": batch["image"],
            "context": masks.context,
            "targets": masks.targets,
            "target_valid": masks.target_valid,
        }
        # In fixed mode the context is exactly its budget: leaving validity out spares the encoder a mask.
        return batch | ({"context_valid": masks.context_valid} if self.spec.mode == "paper" else {})
