"""What keeps a learned hyperparameter from ruining a run. Each guard can be switched off."""

import math
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import Params, Updates

from metaopt.rule import Row, Rule, Values, named, row

RMS_DECAY = 0.9  # of the running mean square that signals are divided by
OF_PEAK = "of_peak_"  # what the name of the rate begins with in GuardState.peak
FAST, SLOW = 0.5, 0.95  # decays of the two running losses that rollback compares


@dataclass(frozen=True)
class Rollback:
    """Returns to a snapshot of the parameters when the loss jumps, and cuts the rate. Needs `value=`, the loss, in `update`.

    Attributes:
      cut: what the learned rate is multiplied by.
      deviations, share: a jump is a running loss above the slow one by this many mean deviations plus this share of it.
      every: updates between snapshots; one is taken only while the loss is not above its slow average.
    """

    cut: float = 0.1
    deviations: float = 10.0
    share: float = 0.2
    every: int = 50

    def __post_init__(self):
        for name in ("cut", "deviations", "share", "every"):
            kind = Integral if name == "every" else Real
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                what = "a whole number" if name == "every" else "a number"
                raise TypeError(f"Rollback({name}={value!r}): give {what}")
        # Written so that NaN is refused, too.
        if not 0 < self.cut < 1:
            raise ValueError(f"Rollback(cut={self.cut}) must lie strictly between 0 and 1")
        for name in ("deviations", "share"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"Rollback({name}={value}) must be finite and not negative")
        if self.every < 1:
            raise ValueError(f"Rollback(every={self.every}) must be at least 1")


@dataclass(frozen=True)
class Guards:
    """The guards of one level. `Guards.none()` is the paper's: none at all.

    Attributes:
      skip_nonfinite: a step with NaN or infinite gradients changes nothing; nor does one whose loss (`value=`) is not
        finite, if the update reads it; entries of an update that are not finite are zero. With max_move all of them
        are then, which is counted, and what is learned does not answer for it; a signal that is not finite, or too
        large to be squared where it is normalised, counts as zero; a step of the upper optimizer that is not finite
        is not taken, and that optimizer stays as it was. All but the gradients are counted, and shown by `learned`
        and `describe`: a keyword that is never learned is seen there.
      safe_sqrt: see metaopt/safe.py; without it one weight of zero gradient makes the signal of b2 NaN.
      normalize: signals are divided by their running root mean square and clipped to [-1, 1], so that the upper
        optimizer's rate is in raw units a step (0.05: at most 5 % a step in the log form), for every unit of the task.
      max_change: largest change of a raw value in a step; 0 for none.
      max_move: largest norm of an update relative to the parameters' norm; 0 for none. A longer update is shortened, and
        the learned rate with it: what makes a rate that is far too high harmless. Needs a learned rate. None, when not
        given: 0.1 in `auto`, 0 in `hyper`.
      settle: so many updates until `max_move` is reached, linearly from zero; 0 for at once. A rate that starts too high is
        then cut before it has moved the parameters far, and one that starts well is warmed up. None, when not given: 100
        in `auto`, 0 in `hyper` or where max_move is 0.
      rollback: see `Rollback`; one more copy of the parameters. Needs a learned rate.
      rate: the keyword that is the rate.
    """

    skip_nonfinite: bool = True
    safe_sqrt: bool = True
    normalize: bool = True
    max_change: float = 0.2
    max_move: float | None = None
    settle: int | None = None
    rollback: Rollback | None = None
    rate: str = "learning_rate"

    def __post_init__(self):
        # Numbers of numpy as numbers of Python, whose type decides no other.
        for name in ("max_change", "max_move", "settle"):
            value = getattr(self, name)
            if isinstance(value, Real) and not isinstance(value, (bool, int, float)):
                object.__setattr__(self, name, float(value))

    @classmethod
    def none(cls) -> "Guards":
        """Every guard off."""
        return cls(
            skip_nonfinite=False, safe_sqrt=False, normalize=False, max_change=0.0, max_move=0.0, settle=0,
        )  # fmt: skip

    def filled(self, max_move: float = 0.0, settle: int = 0) -> "Guards":
        """A copy with these values where none was given."""
        move = max_move if self.max_move is None else self.max_move
        if self.settle is not None:
            settle = self.settle
        elif not move:
            settle = 0
        return replace(self, max_move=move, settle=settle)

    def check(self, rule: Rule) -> None:
        """Raises TypeError or ValueError for settings that do not fit the rule."""
        for name in ("max_change", "max_move", "settle"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Guards({name}={value!r}): give a number, 0 for none")
        for name in ("skip_nonfinite", "safe_sqrt", "normalize"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Guards({name}={getattr(self, name)!r}): give True or False")
        if self.rollback is not None and not isinstance(self.rollback, Rollback):
            raise TypeError(
                f"Guards(rollback={self.rollback!r}): give Rollback(), or None for none"
            )
        assert self.max_move is not None and self.settle is not None  # refused above
        # Written so that NaN is refused, too.
        if not (self.max_change >= 0 and self.max_move >= 0):
            raise ValueError(
                f"max_change={self.max_change} and max_move={self.max_move} must not be negative"
            )
        if not self.settle >= 0 or (self.settle and not self.max_move):
            raise ValueError(f"settle={self.settle} must not be negative, and needs max_move > 0")
        if (self.max_move or self.rollback) and self.rate not in rule.learned:
            what = "max_move" if self.max_move else "rollback"
            raise ValueError(
                f"{what} changes the rate {self.rate!r}, which is not learned (learned: {', '.join(rule.learned)}): "
                f"learn it, name it in Guards(rate=...), or switch {what} off"
            )


class RollbackState(NamedTuple):
    """The snapshot, and running averages of the loss: fast and slow, mean deviation, how many updates they hold."""

    snapshot: Params
    fast: jax.Array
    slow: jax.Array
    deviation: jax.Array
    seen: jax.Array


class GuardState(NamedTuple):
    """What the guards remember; rows are in the order of the keywords' names.

    mean_square: of the signals; () where they are not normalised.  seen i32[]: since the first that was not zero.
    skipped: how many signals were not finite and counted as zero.  refused i32[]: steps of the upper optimizer that were
    not taken.  peak: of the rate, without its schedule: the largest so far, and the present one as a share of that; empty
    where it is not learned.
    rollback: RollbackState, or ().  dropped i32[]: updates of the parameters that were not finite and not made.
    """

    mean_square: Row
    seen: jax.Array
    skipped: Row
    refused: jax.Array
    peak: dict[str, jax.Array]
    rollback: Any
    dropped: jax.Array


def init_guards(guards: Guards, rule: Rule, raw: Values, params: Params) -> GuardState:
    dtype, back = rule.dtype(params), ()
    if guards.rollback:
        # An array of its own for each: a buffer can be donated only once.
        fast, slow, deviation = (jnp.zeros((), dtype) for _ in range(3))
        snapshot = jax.tree.map(jnp.copy, params)
        back = RollbackState(snapshot, fast, slow, deviation, jnp.zeros((), jnp.int32))
    return GuardState(
        mean_square=row(jax.tree.map(jnp.zeros_like, raw)) if guards.normalize else (),
        seen=jnp.zeros((), jnp.int32),
        skipped=row(jax.tree.map(lambda r: jnp.zeros(r.shape, jnp.int32), raw)),
        refused=jnp.zeros((), jnp.int32),
        peak={
            k: jnp.ones_like(raw[guards.rate]) for k in _peak_names(guards) if guards.rate in raw
        },
        rollback=back,
        dropped=jnp.zeros((), jnp.int32),
    )


def counted(guards: Guards, state: GuardState, signals: Values) -> tuple[Values, GuardState]:
    """Signals with zero for what is not finite, and their count.

    Where signals are normalised their squares must be finite, too: an infinite mean square would stay forever.
    """
    bad = jax.tree.map(lambda h: ~jnp.isfinite(h * h if guards.normalize else h), signals)
    skipped = tuple(n + b.astype(n.dtype) for n, b in zip(state.skipped, row(bad), strict=True))
    signals = jax.tree.map(lambda b, h: jnp.where(b, 0, h), bad, signals)
    return signals, state._replace(skipped=skipped)


def taken(state: GuardState, steps: Updates, new: Any, old: Any) -> tuple[Updates, Any, GuardState]:
    """(steps, state of the upper optimizer, state): nothing moves where a step is not finite."""
    good = finite(steps)
    steps = jax.tree.map(lambda s: jnp.where(good, s, 0), steps)
    refused = state.refused + (~good).astype(jnp.int32)
    return steps, select(good, new, old), state._replace(refused=refused)


def dropped(state: GuardState, one: jax.Array) -> GuardState:
    """The state with one more update that was not made, where `one` is true."""
    return state._replace(dropped=state.dropped + one.astype(jnp.int32))


def normalized(guards: Guards, state: GuardState, signals: Values) -> tuple[Values, GuardState]:
    """Signals in [-1, 1]."""
    if not guards.normalize:
        return signals, state
    square = jax.tree.map(
        lambda s, h: RMS_DECAY * s + (1 - RMS_DECAY) * h * h,
        named(signals, state.mean_square),
        signals,
    )
    # Until the first signal that is not zero there is nothing to average.
    seen = jnp.where(any_nonzero(square), state.seen + 1, 0)
    decay = jnp.asarray(RMS_DECAY, jnp.result_type(*square.values()))
    correction = 1 - jax.lax.pow(decay, jnp.maximum(seen, 1))

    def divided(h, s):
        s = s / correction
        # One signal alone has nothing to be large or small against: Adam's first one for b2 is rounding noise.
        known = (s > 0) & (seen > 1)
        return jnp.clip(jnp.where(known, h * jax.lax.rsqrt(jnp.where(known, s, 1)), 0), -1, 1)

    state = state._replace(mean_square=row(square), seen=seen)
    return jax.tree.map(divided, signals, square), state


def peaked(guards: Guards, rule: Rule, state: GuardState, raw: Values, start: Any) -> GuardState:
    """The largest rate so far, and the present one as a share of it; where `start` is true, both start again."""
    if guards.rate not in raw:
        return state
    rate = rule.learned[guards.rate].unscheduled(raw[guards.rate])
    largest, share = _peak_names(guards)
    peak = jnp.where(start, rate, jnp.maximum(state.peak[largest], rate))
    part = jnp.where(peak > 0, rate / jnp.where(peak > 0, peak, 1), 1)
    return state._replace(peak={largest: peak, share: part})


def _peak_names(guards: Guards) -> tuple[str, str]:
    return f"largest_{guards.rate}", OF_PEAK + guards.rate


def parts_of(x: jax.Array) -> tuple[jax.Array, ...]:
    """The real and the imaginary part, or the one there is."""
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def any_nonzero(tree: Any) -> jax.Array:
    return jnp.any(jnp.array([jnp.any(x != 0) for x in jax.tree.leaves(tree)]))


def shortening(
    guards: Guards,
    rule: Rule,
    updates: Updates,
    params: Params | None,
    count: jax.Array,
    axis_name: Any,
) -> tuple[jax.Array, jax.Array]:
    """(the factor in [0, 1] that keeps update `count` (from 0) within `max_move` of the parameters' norm, whether all
    updates are finite)."""
    if params is None:
        raise ValueError(
            "Guards(max_move=...) needs the parameters: call update(grads, state, params)"
        )
    dtype, size = rule.dtype(updates), sum(x.size for x in jax.tree.leaves(params))
    # Squares of large numbers overflow; those of the same numbers times this do not. A power of two: nothing is rounded.
    unit = 2.0 ** -(5 * jnp.finfo(dtype).maxexp // 8)

    def norms(by):
        trees = (
            [p.astype(dtype) for x in jax.tree.leaves(t) for p in parts_of(x)]
            for t in (updates, params)
        )
        sums = [sum(jnp.sum(jnp.square(p * by)) for p in parts) for parts in trees]
        sums = jnp.stack([jnp.asarray(x, dtype) for x in sums])
        return jnp.sqrt(sums if axis_name is None else jax.lax.psum(sums, axis_name))

    assert guards.max_move is not None and guards.settle is not None  # they are filled
    plain = norms(1.0)
    overflows = ~jnp.isfinite(plain)
    again = jax.lax.cond(jnp.any(overflows), lambda: norms(unit), lambda: jnp.zeros_like(plain))
    moved, norm = jnp.where(overflows, again, plain * unit)  # in units of 1 / `unit`
    # Parameters that start at zero have no norm to compare with: they count as 0.001 each.
    norm = jnp.maximum(norm, 1e-3 * size**0.5 * unit)
    part = jnp.minimum(1, (count.astype(dtype) + 1) / max(guards.settle, 1))
    longest = guards.max_move * part * norm
    too_long = moved > longest
    factor = jnp.where(too_long, longest / jnp.where(too_long, moved, 1), 1)
    return factor, jnp.isfinite(moved)


def watch_loss(
    rollback: Rollback, state: RollbackState, value: Any, params: Params | None
) -> tuple[jax.Array, RollbackState]:
    """(whether the loss jumped, new averages and snapshot); `value` is the loss at `params`."""
    if value is None:
        raise ValueError(
            "rollback watches the loss: call update(grads, state, params, value=loss), or switch it off with "
            "Guards(rollback=None)"
        )
    if params is None:
        raise ValueError(
            "rollback needs the parameters: call update(grads, state, params, value=loss)"
        )
    value = jnp.asarray(value, state.fast.dtype)
    first = state.seen == 0
    fast = jnp.where(first, value, FAST * state.fast + (1 - FAST) * value)
    # NaN compares false: what is not known to be low is a jump.
    limit = (
        state.slow + rollback.deviations * state.deviation + rollback.share * jnp.abs(state.slow)
    )
    jumped = jnp.where(first, ~jnp.isfinite(value), ~(fast <= limit))
    slow = jnp.where(first, value, SLOW * state.slow + (1 - SLOW) * value)
    off = jnp.abs(value - slow)
    deviation = jnp.where(first, off, SLOW * state.deviation + (1 - SLOW) * off)
    take = (state.seen % rollback.every == 0) & (fast <= slow) & ~jumped
    snapshot = jax.tree.map(lambda new, old: jnp.where(take, new, old), params, state.snapshot)
    watched = RollbackState(snapshot, fast, slow, deviation, state.seen + 1)
    # After a jump the averages go on from where they stood before it.
    back = state._replace(fast=state.slow)
    return jumped, jax.tree.map(lambda b, w: jnp.where(jumped, b, w), back, watched)


def back_to(snapshot: Params, params: Params, like: Updates) -> Updates:
    """The updates that lead from the parameters to the snapshot."""
    return jax.tree.map(lambda s, p, u: (s - p).astype(u.dtype), snapshot, params, like)


def finite(tree: Any) -> jax.Array:
    """Whether all numbers of a small tree are finite."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def select(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: n if n is o else jnp.where(condition, n, o), new, old)
