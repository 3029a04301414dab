"""AdamW whose learning rate and weight decay learn themselves: `--config.optim.auto=true` in any training config."""

from typing import Any

import jax
import optax

import metaopt
from common.optim import Log, Mask, OptimSpec, adamw, decays, scheduled
from metaopt import learn


def optimizer(
    spec: OptimSpec, steps: int, mask: Mask = decays
) -> tuple[optax.GradientTransformation, Log]:
    """The optimizer of a run of `steps` updates, and what the log shows of it; `mask` says what decays."""
    if spec.auto:
        return _learning(spec, mask), _learned
    return adamw(spec, steps, mask), scheduled(spec, steps)


def _learning(spec: OptimSpec, mask: Mask) -> optax.GradientTransformation:
    """`metaopt.auto` from the specification's peak rate and first weight decay; no schedule."""

    def factory(learning_rate: Any, weight_decay: Any = spec.weight_decay):
        fixed: dict[str, Any] = dict(b1=spec.b1, b2=spec.b2, eps=spec.eps, mask=mask)
        update = optax.adamw(learning_rate, weight_decay=weight_decay, **fixed)
        # Clipping belongs inside: the signal is then that of the raw gradient.
        return optax.chain(optax.clip_by_global_norm(spec.clip), update) if spec.clip else update

    rates: dict[str, Any] = {"learning_rate": learn(spec.lr)}
    if spec.weight_decay:
        rates["weight_decay"] = learn(spec.weight_decay)
    return metaopt.auto(factory, **rates)


def _learned(opt_state: Any, step: jax.Array) -> dict[str, jax.Array]:
    """What is learned, under the names that the schedules have in the log."""
    values = metaopt.learned(opt_state)
    return {
        name: values[keyword]
        for name, keyword in (("lr", "learning_rate"), ("weight_decay", "weight_decay"))
        if keyword in values
    }
