"""The one-liner: `metaopt.auto(optax.adamw)` where `optax.adamw(3e-4)` was."""

from collections.abc import Callable
from typing import Any

import optax

from metaopt.guards import Guards
from metaopt.hyper import hyper
from metaopt.learn import Learn, learn
from metaopt.signals import Trace


def top(nats: float = 1.0) -> optax.GradientTransformation:
    """The recommended upper optimizer: AdaGrad from an accumulator of zero, which has no scale to set.

    Behind `Guards.normalize` its n-th step is at most `nats / sqrt(n)` long, in the raw unit: with the log form a factor
    e, for every task. While signals agree, `Guards.max_change` is what limits it.
    """
    return optax.adagrad(nats, initial_accumulator_value=0.0, eps=1e-30)


def auto(
    factory: Callable[..., optax.GradientTransformation],
    *,
    learning_rate: float | Learn = 1e-3,
    guards: Guards | None = Guards(),
    by: optax.GradientTransformation | None = None,
    trace: Trace = Trace(power=1.0),
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """`factory` with a learning rate that finds itself; it works from an initial rate 1e8 times too low or 1e4 too high.

    The one-step signal of the paper shrinks the rate too soon, since the noise of the last step hides what the rate does
    over many. Here the signal looks back over a fixed part of the run so far (`Trace(power=1)`), the rate moves in its
    logarithm by a scale-free upper optimizer (`top`), and no update is longer than a tenth of the parameters' norm (a
    thousandth at first: 100 updates lead up to it), which pulls a rate that is far too high down before it does harm. One
    float32 copy of the parameters is kept.

    Where it stalls: without gradient noise (the whole data set in each batch, a small deterministic task), and after a
    large shift of the target or one outlier gradient, the rate can fall and not come back; training then stands still,
    with no error. `metaopt.learned(state)["of_peak/learning_rate"]` is the rate over its largest so far: below 1e-4, with a
    loss that is not at its minimum, it has stalled. On deterministic tasks use the signal of the last update alone
    (`trace=Trace()`), against outliers clipping inside the factory. In a run that has stalled,
    `state = optax.tree.set(state, learning_rate=1e-3)` sets the rate again; it falls again if its reason is still there,
    and then a fixed rate is better.

    To log: `optax.tree.get(state, "learning_rate")`, or `metaopt.learned(state)` for all there is to see.

    Args:
      factory: takes `learning_rate`; further keywords may be `learn(...)` as well.
      learning_rate: where to start, or `learn(...)`; `learn(1.0, schedule=...)` learns a factor in front of a schedule.
      guards: what is not given in them is as here: Guards(rollback=Rollback()) adds rollback, which needs `value=`, and
        keeps the rest; Guards(max_move=0) lets updates be of any length. None for none at all.
      by, trace: replace our defaults.
    """
    if callable(learning_rate):
        raise TypeError(
            "auto(learning_rate=<a schedule>): give learn(1.0, schedule=...), which learns a factor in front of it, or a "
            "number, which needs no schedule"
        )
    rate = learning_rate if isinstance(learning_rate, Learn) else learn(learning_rate)
    if isinstance(guards, Guards):
        guards = guards.filled(max_move=0.1, settle=100)
    by = top() if by is None else by
    return hyper(factory, learning_rate=rate, by=by, guards=guards, trace=trace, **kwargs)
