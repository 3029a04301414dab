"""The paper's algorithm as one optax transformation: every optimizer's hyperparameters are the next one's parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from optax import OptState, Params, Updates

from metaopt import guards as guarding
from metaopt.guards import Guards
from metaopt.pack import Packed, packed
from metaopt.rule import Row, Rule, Values, make_rule, named, needs_value, row
from metaopt.signals import Mode, Trace, choose, pack_sum, refuse_unkept, scaled


class HyperState(NamedTuple):
    """One level of a tower; plain arrays only.

    updates i32[]: how many were done.  values: what is learned, by keyword, in natural units, as used in the last update.
    `optax.tree.get(state, "learning_rate")` finds it, and what `optax.tree.set(state, learning_rate=0.5)` puts there is
    what the next update uses, unless `max_move` shortens it; a value that the keyword cannot have is not taken.
    used: the values again, to see what was set.  raws: learned hyperparameters, unconstrained.  slopes: the last
    hypergradients by them, before guards.  base: the base optimizer's state.  by: the upper optimizer's, packed
    (`inspect.levels` unpacks it).  memory: what the signal needs of the last update.  guard: what the guards remember.
    moved bool[]: whether there is a last update to judge.

    Rows (used, raws, slopes) are in the order of the keywords' names; `raw` and `signals` give them with their names.
    """

    updates: jax.Array
    values: Values
    used: Row
    raws: Row
    slopes: Row
    base: OptState
    by: Packed
    memory: Any
    guard: guarding.GuardState
    moved: jax.Array

    @property
    def raw(self) -> Values:
        """Learned hyperparameters by keyword, unconstrained."""
        return named(self.values, self.raws)

    @property
    def signals(self) -> Values:
        """d loss / d raw by keyword."""
        return named(self.values, self.slopes)


def hyper(
    factory: Callable[..., optax.GradientTransformation],
    *,
    by: optax.GradientTransformation,
    guards: Guards | None = Guards(),
    mode: str = "auto",
    trace: Trace = Trace(),
    axis_name: Any = None,
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """`factory(**kwargs)`, with every keyword that is `learn(...)` learned by `by` from its hypergradient.

      hyper(optax.adamw, learning_rate=learn(1e-3), weight_decay=1e-2, by=optax.sgd(0.02))

    Goes wherever an optax transformation goes; its state is arrays, and the train step stays as it is. Clipping belongs
    inside, in a factory that returns the whole chain, so that the signal is that of the raw gradient. Whatever changes
    the updates afterwards (masks, EMA, projections) makes the signal approximate.

    Args:
      factory: any function that returns a transformation. It is called at every update, with the present values.
      by: any optax transformation; it updates the raw values from their hypergradients. `hyper(...)` again for a tower
        of any height. With the default guards its rate is the change of a raw value a step.
      guards: see `Guards`; None for none, as the paper has it.
      mode: how the last update is differentiated (metaopt/signals.py). "auto" takes the one with the least memory;
        `describe(state)` says which, and what it costs.
      trace: how far back signals look; the last update alone by default.
      axis_name: mesh axes over which parameters are split by hand, in `jax.shard_map`. Not for arrays that `jax.jit` shards.
      kwargs: the factory's; `learn(...)` or constants.

    `update` takes two extra arguments of its own and passes all others on: `value`, the loss, which rollback needs; and
    `hyper_cotangent`, a gradient tree to use in the signal in place of `grads`, such as that of a held-out batch. Gradients
    of complex parameters are what optax takes, the conjugates of those of `jax.grad`. It raises ValueError where the trees
    `grads`, `params` and `hyper_cotangent` differ in structure or shapes.

    Raises:
      TypeError, ValueError: a keyword that the factory does not take, that must be a Python constant, or on which its
        update does not smoothly depend; an initial value outside its bounds; `by` that is no transformation.
    """
    level = _level(factory, kwargs, by, guards, mode, trace, axis_name)

    def init(params: Params) -> HyperState:
        return _init(level, params)

    def update(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        *,
        value: Any = None,
        hyper_cotangent: Updates | None = None,
        **extra: Any,
    ) -> tuple[Updates, HyperState]:
        if value is not None:
            extra["value"] = value
        return _update(level, updates, state, params, hyper_cotangent, extra)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclass(frozen=True)
class _Level:
    """One optimizer and what learns its hyperparameters."""

    rule: Rule
    method: Mode
    upper: optax.GradientTransformationExtraArgs
    guards: Guards
    trace: Trace
    axis_name: Any
    reads_value: bool  # whether the update may read the loss


def _level(
    factory: Any, kwargs: dict, by: Any, guards: Any, mode: str, trace: Trace, axis_name: Any
) -> _Level:
    """What `hyper` was given, or why it cannot be."""
    if not (callable(getattr(by, "init", None)) and callable(getattr(by, "update", None))):
        raise TypeError(
            f"by={by!r} is not an optax transformation; give the optimizer of the hyperparameters, e.g. by=optax.sgd(0.02)"
        )
    if guards is not None and not isinstance(guards, Guards):
        raise TypeError(f"guards={guards!r}: give Guards(...), or None for no guards at all")
    guards = (guards or Guards.none()).filled()
    rule = make_rule(factory, kwargs)
    guards.check(rule)
    method = choose(rule, mode, trace, guards.safe_sqrt)
    reads_value = needs_value(rule) is not False
    return _Level(rule, method, packed(by), guards, trace, axis_name, reads_value)


def _init(level: _Level, params: Params) -> HyperState:
    rule = level.rule
    for path, x in jax.tree.flatten_with_path(params)[0]:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is {x.dtype.name}, which has no gradient: leave it out of the "
                "parameters, or give it optax.set_to_zero() with optax.partition"
            )
    raw = rule.init_raw(params)
    updates = jnp.zeros((), jnp.int32)
    values = rule.values(level.method.settled(rule, raw, updates, params), updates)
    state = HyperState(
        updates=updates,
        values=values,
        used=row(values),
        raws=row(raw),
        slopes=row(jax.tree.map(jnp.zeros_like, raw)),
        base=rule.init(params),
        by=cast(Packed, level.upper.init(raw)),
        memory=level.method.init(rule, params),
        guard=guarding.init_guards(level.guards, rule, raw, params),
        moved=jnp.zeros((), bool),
    )
    return _of_its_own(state, params)


def _of_its_own(state: HyperState, params: Params) -> HyperState:
    """The state with every array a buffer of its own, so that a train step can donate it together with the parameters."""
    seen = {id(x) for x in jax.tree.leaves(params)}

    def own(x):
        if id(x) in seen and not isinstance(x, jax.ShapeDtypeStruct):
            x = jnp.copy(x)
        seen.add(id(x))
        return x

    return jax.tree.map(own, state)


def _update(
    level: _Level,
    grads: Updates,
    state: HyperState,
    params: Params | None,
    hyper_cotangent: Updates | None,
    extra: dict,
) -> tuple[Updates, HyperState]:
    """(updates, state). 1. How the loss would have changed with the last update's hyperparameters: [du/dh]^T g."""
    rule, method, guards = level.rule, level.method, level.guards
    if params is not None:
        _alike("grads", grads, "params", params)
    if hyper_cotangent is not None:
        _alike("hyper_cotangent", hyper_cotangent, "grads", grads)
    state = state._replace(
        values={k: _like(v, r) for (k, v), r in zip(sorted(state.values.items()), state.raws)}
    )
    refuse_unkept(method, rule, state.values, grads, state.base, params, extra)
    last = jnp.maximum(state.updates - 1, 0)
    cotangent = grads if hyper_cotangent is None else hyper_cotangent
    signals = method.signal(rule, cotangent, state.memory, state.raw, last, state.base, params)
    signals = pack_sum(signals, level.axis_name)

    def advance(grads: Updates) -> tuple[Updates, HyperState]:
        return _advance(level, grads, _above(level, signals, state), state, params, extra)

    if guards.skip_nonfinite:
        # Where a NaN in any gradient is one in the sums, the gradients themselves are read only when there is one.
        known = method.reads_all and hyper_cotangent is None
        good = jax.lax.cond(
            guarding.finite(signals) if known else jnp.zeros((), bool),
            lambda: jnp.ones((), bool),
            lambda: _all_finite(grads, level.axis_name),
        )
        read = level.reads_value and "value" in extra
        known_loss = guarding.finite(extra["value"]) if read else jnp.ones((), bool)
        stopped = guarding.dropped(state.guard, good & ~known_loss)

        def stay(grads: Updates) -> tuple[Updates, HyperState]:
            return jax.tree.map(jnp.zeros_like, grads), state._replace(guard=stopped)

        # As an operand, and not closed over: then zeros like them lie as they do, on an Explicit mesh without jit, too.
        updates, new = jax.lax.cond(good & known_loss, advance, stay, grads)
    else:
        updates, new = advance(grads)
    if guards.rollback:
        old = state.guard.rollback
        jumped, back = guarding.watch_loss(guards.rollback, old, extra.get("value"), params)
        assert params is not None  # refused above
        home = guarding.back_to(back.snapshot, params, updates)
        updates = guarding.select(jumped, home, updates)
        new = guarding.select(jumped, _restarted(level, new, params), new)
        new = new._replace(guard=new.guard._replace(rollback=back))
    return updates, new


class _Above(NamedTuple):
    """What the level above has done: scalars only."""

    raw: Values
    was_set: dict[str, jax.Array]
    signals: Values
    by: Any
    guard: guarding.GuardState


def _above(level: _Level, signals: Values, state: HyperState) -> _Above:
    """2. The level above moves the hyperparameters, after the levels above it have moved its own."""
    rule, guards, count = level.rule, level.guards, state.updates
    signals = jax.tree.map(lambda h: jnp.where(state.moved, h, 0), signals)
    guard = state.guard
    if guards.skip_nonfinite:
        signals, guard = guarding.counted(guards, guard, signals)
    steps, guard = guarding.normalized(guards, guard, signals)
    steps, by_state = level.upper.update(steps, state.by, state.raw)
    if guards.skip_nonfinite:
        steps, by_state, guard = guarding.taken(guard, steps, by_state, state.by)
    if guards.max_change:
        limit = guards.max_change
        steps = jax.tree.map(lambda s: jnp.clip(s, -limit, limit), steps)
    last = jnp.maximum(count - 1, 0)
    raw, was_set = rule.by_hand(state.raw, state.values, named(state.values, state.used), last)
    steps = jax.tree.map(lambda was, s: jnp.where(was, 0, s), was_set, steps)
    raw = rule.clip(jax.tree.map(lambda r, s: (r + s).astype(r.dtype), raw, steps))
    return _Above(raw, was_set, signals, by_state, guard)


def _advance(
    level: _Level,
    grads: Updates,
    above: _Above,
    state: HyperState,
    params: Params | None,
    extra: dict,
) -> tuple[Updates, HyperState]:
    """3. The base optimizer moves the parameters, with the new values."""
    rule, method, guards, count = level.rule, level.method, level.guards, state.updates
    raw = above.raw
    step = method.step(rule, raw, count, grads, state.base, params, extra)
    updates, memory, made = step.updates, step.memory, jnp.ones((), bool)
    if guards.max_move:
        factor, made = guarding.shortening(guards, rule, updates, params, count, level.axis_name)
        updates, memory = scaled(factor, updates), method.shortened(memory, factor)
        rate = method.settled(rule, raw, count, params)[guards.rate]
        rate = rule.learned[guards.rate].scaled(rate, factor)
        raw = rule.clip(raw | {guards.rate: jnp.where(made & (factor < 1), rate, raw[guards.rate])})
    guard = above.guard
    if guards.skip_nonfinite:
        # Without max_move entry by entry, and not counted: whether all are finite would be a further pass over the update.
        good = (lambda u: made) if guards.max_move else jnp.isfinite
        updates = jax.tree.map(lambda u: jnp.where(good(u), u, 0), updates)
        guard = guarding.dropped(guard, ~made)
    if level.trace:
        memory = level.trace.added(state.memory, memory, count)
    start = (count == 0) | above.was_set.get(guards.rate, False)
    values = rule.values(method.settled(rule, raw, count, params), count)
    return updates, HyperState(
        updates=count + made.astype(count.dtype),
        values=values,
        used=jax.tree.map(jnp.copy, row(values)),  # no buffer twice, if this is not inside jit
        raws=row(raw),
        slopes=row(above.signals),
        base=step.base,
        by=above.by,
        memory=memory,
        guard=guarding.peaked(guards, rule, guard, raw, start),
        moved=made,
    )


def _restarted(level: _Level, new: HyperState, params: Params) -> HyperState:
    """The state after a return to the snapshot: a lower rate, and a fresh base optimizer, since its averages hold the
    gradients of the explosion."""
    rule, guards, raw = level.rule, level.guards, new.raw
    assert guards.rollback
    cut = rule.learned[guards.rate].scaled(raw[guards.rate], jnp.asarray(guards.rollback.cut))
    raw = rule.clip(raw | {guards.rate: cut})
    last = jnp.maximum(new.updates - 1, 0)
    values = rule.values(level.method.settled(rule, raw, last, params), last)
    return new._replace(
        values=values,
        used=row(values),
        raws=row(raw),
        base=rule.init(params),
        memory=jax.tree.map(jnp.zeros_like, new.memory),
        guard=guarding.peaked(guards, rule, new.guard, raw, True),
        moved=jnp.zeros((), bool),
    )


def _alike(name: str, tree: Any, of: str, other: Any) -> None:
    """Raises ValueError where the trees differ in structure or in an array's shape: sums over pairs of leaves would be of
    the wrong pairs."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves, _ = jax.tree.flatten_with_path(tree)
        return {jax.tree_util.keystr(path): x.shape for path, x in leaves}

    got, wanted = shapes(tree), shapes(other)
    for path in [*wanted, *got]:
        if got.get(path) != wanted.get(path):
            has = f"has shape {got[path]}" if path in got else "is missing"
            wants = f"has shape {wanted[path]}" if path in wanted else f"is not in {of}"
            where = path or "the tree itself"
            raise ValueError(f"{name} must be a tree like {of}: {where} {has}, but {wants}")
    structure, like = jax.tree.structure(tree), jax.tree.structure(other)
    if structure != like:
        raise ValueError(f"{name} must be a tree like {of}: it is {structure}, not {like}")


def _like(value: Any, raw: jax.Array) -> jax.Array:
    """A value as an array, since a user may have set a number."""
    return jnp.broadcast_to(jnp.asarray(value, raw.dtype), raw.shape)


def _all_finite(tree: Any, axis_name: Any) -> jax.Array:
    good = guarding.finite(tree)
    return good if axis_name is None else jax.lax.pmin(good.astype(jnp.int32), axis_name) > 0
