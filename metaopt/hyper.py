"""The paper's algorithm as one optax transformation: every optimizer's hyperparameters are the next one's parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt import guards as guarding
from metaopt.guards import Guards
from metaopt.pack import Packed, packed
from metaopt.rule import Values, make_rule
from metaopt.signals import Trace, choose, pack_sum


class HyperState(NamedTuple):
    """One level of a tower; plain arrays only.

    count i32[]: updates done.  raw: learned hyperparameters, unconstrained.  values: the same in natural units, as used in
    the last update.  signals: the last hypergradients by raw, before guards.  base: the base optimizer's state.  by: the
    upper optimizer's, packed (`inspect.levels` unpacks it).  memory: what the signal needs of the last update.
    guard: what the guards remember.  moved bool[]: whether there is a last update to judge.
    """

    count: jax.Array
    raw: Values
    values: Values
    signals: Values
    base: Any
    by: Packed
    memory: Any
    guard: guarding.GuardState
    moved: jax.Array


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
      guards: see `Guards`; None for none.
      mode: how the derivative of the last update is had (metaopt/signals.py). "auto" takes the one with the least memory;
        `describe(state)` says which, and what it costs.
      trace: how far back signals look; the last update alone by default.
      axis_name: mesh axes over which parameters are split by hand, in `jax.shard_map`. Not for arrays that `jax.jit` shards.
      kwargs: the factory's; `learn(...)` or constants.

    `update` takes two extra arguments of its own and passes all others on: `value`, the loss, which rollback needs; and
    `hyper_cotangent`, a gradient tree to use in the signal in place of `grads`, such as that of a held-out batch.

    Raises:
      TypeError, ValueError: a keyword that the factory does not take, that must be a Python constant, or on which its
        update does not smoothly depend; an initial value outside its bounds; `by` that is no transformation.
    """
    if not (callable(getattr(by, "init", None)) and callable(getattr(by, "update", None))):
        raise TypeError(
            f"by={by!r} is not an optax transformation; give the optimizer of the hyperparameters, e.g. by=optax.sgd(0.02)"
        )
    guards = guards or Guards.none()
    rule = make_rule(factory, kwargs)
    guards.check(rule)
    method = choose(rule, mode, trace, guards.safe_sqrt)
    upper = packed(by)

    def init(params: Any) -> HyperState:
        raw = rule.init_raw(params)
        count = jnp.zeros((), jnp.int32)
        return HyperState(
            count=count,
            raw=raw,
            values=rule.values(raw, count),
            signals=jax.tree.map(jnp.zeros_like, raw),
            base=rule.init(params),
            by=upper.init(raw),
            memory=method.init(rule, params),
            guard=guarding.init_guards(guards, rule, raw, params),
            moved=jnp.zeros((), bool),
        )

    def update(
        grads: Any,
        state: HyperState,
        params: Any = None,
        *,
        value: Any = None,
        hyper_cotangent: Any = None,
        **extra: Any,
    ) -> tuple[Any, HyperState]:
        if value is not None:
            extra["value"] = value
        # 1. How the loss would have changed with the last update's hyperparameters: [du/dh]^T g.
        cotangent = grads if hyper_cotangent is None else hyper_cotangent
        last = jnp.maximum(state.count - 1, 0)
        signals = method.signal(rule, cotangent, state.memory, state.raw, last, state.base, params)
        signals = pack_sum(signals, axis_name)
        # A NaN in any gradient is a NaN in the sums, so the gradients themselves are read only when there is one.
        good = jax.lax.cond(
            guarding.finite(signals),
            lambda: jnp.ones((), bool),
            lambda: _all_finite(grads, axis_name),
        )
        signals = jax.tree.map(lambda h: jnp.where(state.moved, h, 0), signals)
        if guards.skip_nonfinite:
            signals = jax.tree.map(lambda h: jnp.where(jnp.isfinite(h), h, 0), signals)

        def advance() -> tuple[Any, HyperState]:
            # 2. The level above moves the hyperparameters, after the levels above it have moved its own.
            steps, guard = guarding.normalized(guards, state.guard, signals)
            steps, by_state = upper.update(steps, state.by, state.raw)
            if guards.max_change:
                limit = guards.max_change
                steps = jax.tree.map(lambda s: jnp.clip(s, -limit, limit), steps)
            raw = jax.tree.map(lambda r, s: (r + s).astype(r.dtype), state.raw, steps)
            raw = rule.clip(raw)

            # 3. The base optimizer moves the parameters, with the new values.
            step = method.step(rule, raw, state.count, grads, state.base, params, extra)
            updates, memory = step.updates, step.memory
            if guards.max_move:
                factor = guarding.shortening(guards, rule, updates, params, state.count, axis_name)
                updates, memory = _times(factor, updates), _shorten(memory, factor)
                rate = guards.rate
                raw = rule.clip(raw | {rate: rule.learned[rate].scaled(raw[rate], factor)})
            if trace:
                memory = _traced(trace, state.memory, memory, state.count)
            values = rule.values(raw, state.count)
            moved = jnp.ones((), bool)
            return updates, HyperState(
                state.count + 1, raw, values, signals, step.base, by_state, memory, guard, moved
            )

        def stay() -> tuple[Any, HyperState]:
            return jax.tree.map(jnp.zeros_like, grads), state

        updates, new = jax.lax.cond(good, advance, stay) if guards.skip_nonfinite else advance()
        if guards.rollback:
            jumped, back = guarding.watch_loss(guards.rollback, state.guard.rollback, value, params)
            home = guarding.back_to(back.snapshot, params, updates)
            updates = guarding.select(jumped, home, updates)
            new = guarding.select(jumped, _restarted(new, params), new)
            new = new._replace(guard=new.guard._replace(rollback=back))
        return updates, new

    def _restarted(new: HyperState, params: Any) -> HyperState:
        """The state after a return to the snapshot: a lower rate, and a fresh base optimizer, since its averages hold
        the gradients of the explosion."""
        assert guards.rollback
        raw = new.raw | {
            guards.rate: rule.learned[guards.rate].scaled(
                new.raw[guards.rate], jnp.asarray(guards.rollback.cut)
            )
        }
        raw = rule.clip(raw)
        return new._replace(
            raw=raw,
            values=rule.values(raw, jnp.maximum(new.count - 1, 0)),
            base=rule.init(params),
            memory=jax.tree.map(jnp.zeros_like, new.memory),
            moved=jnp.zeros((), bool),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _all_finite(tree: Any, axis_name: Any) -> jax.Array:
    good = guarding.finite(tree)
    return good if axis_name is None else jax.lax.pmin(good.astype(jnp.int32), axis_name) > 0


def _times(factor: jax.Array, tree: Any) -> Any:
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def _shorten(memory: Any, factor: jax.Array) -> Any:
    """The memory of an update that was multiplied by `factor`; what Closed and Replay keep follows from the rate."""
    tangents = getattr(memory, "tangents", None)
    return memory if tangents is None else memory._replace(tangents=_times(factor, tangents))


def _traced(trace: Trace, old: Any, new: Any, count: jax.Array) -> Any:
    def add(z, t):
        keep = jax.lax.optimization_barrier(jnp.asarray(trace.keep(count, z.dtype), z.dtype))
        # A derivative that is not finite, once added, would stay for ever.
        return (keep * z + jnp.where(jnp.isfinite(t), t, 0)).astype(z.dtype)

    return new._replace(tangents=jax.tree.map(add, old.tangents, new.tangents))
