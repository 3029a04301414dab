"""AdamW as the papers use it, from a plain specification."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

from common.schedules import Schedule, cosine, warmup_cosine
from common.sharding import path_name

Mask = Callable[[Any], Any]  # parameters -> a tree of bools, of the same structure
Log = Callable[[Any, jax.Array], dict[str, jax.Array]]  # optimizer state, step -> scalars to log


@dataclass(frozen=True)
class OptimSpec:
    """AdamW and its schedules.

    Attributes:
      lr: peak learning rate.  start_lr: first learning rate.  final_lr: last learning rate.
      warmup: updates of linear warm-up.
      weight_decay: decoupled decay at the start; it multiplies the learning rate (torch's and optax's convention).
      final_weight_decay: decay at the end, along a cosine.
      b1: AdamW's decay rate of the first moment.  b2: that of the second.  eps: AdamW's epsilon.
      clip: largest global gradient norm; None for no clipping (I-JEPA's).
      schedule_scale: stretches all schedules beyond the run (`ipe_scale`: 1.0 for I-JEPA, 1.25 for V-JEPA).
      auto: whether rate and decay learn themselves, from `lr` and `weight_decay` on. `adamw` does not.
    """

    lr: float = 1e-3
    start_lr: float = 2e-4
    final_lr: float = 1e-6
    warmup: int = 0
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float | None = None
    schedule_scale: float = 1.0
    auto: bool = False

    def __post_init__(self):
        if self.lr <= 0 or min(self.start_lr, self.final_lr) < 0:
            raise ValueError(
                f"optim.lr={self.lr} must be positive, start_lr and final_lr not negative"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"optim.clip={self.clip} must be positive, or None for no clipping")
        if self.schedule_scale < 1:
            raise ValueError(f"optim.schedule_scale={self.schedule_scale} must be at least 1")

    def lr_schedule(self, steps: int) -> Schedule:
        """The learning rate over a run of `steps` updates."""
        total = int(self.schedule_scale * steps)
        if self.warmup > total:
            raise ValueError(
                f"optim.warmup={self.warmup} steps is longer than the run of {total}: lower it, or train longer"
            )
        return warmup_cosine(self.start_lr, self.lr, self.final_lr, self.warmup, total)

    def weight_decay_schedule(self, steps: int) -> Schedule:
        """The weight decay over a run of `steps` updates."""
        return cosine(self.weight_decay, self.final_weight_decay, int(self.schedule_scale * steps))


def decays(params: Any) -> Any:
    """True for every parameter that weight decay applies to: all but biases and norm scales.

    By name, since stacked blocks give a bias two dimensions; a mask token decays, as in the released code.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_name(path).rsplit("/", 1)[-1] not in ("bias", "scale"), params
    )


def adamw(spec: OptimSpec, steps: int, mask: Mask = decays) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates; `mask` says what decays."""
    if spec.auto:
        raise ValueError("optim.auto asks for an optimizer that learns: give the recipe one")
    update = optax.adamw(
        spec.lr_schedule(steps),
        b1=spec.b1,
        b2=spec.b2,
        eps=spec.eps,
        weight_decay=spec.weight_decay_schedule(steps),
        mask=mask,
    )
    return optax.chain(optax.clip_by_global_norm(spec.clip), update) if spec.clip else update


def scheduled(spec: OptimSpec, steps: int) -> Log:
    """What the log shows of `adamw`."""
    lr, weight_decay = spec.lr_schedule(steps), spec.weight_decay_schedule(steps)
    return lambda opt_state, step: {"lr": lr(step), "weight_decay": weight_decay(step)}
