"""Hypergradients: the last update's derivative by each hyperparameter, times the fresh gradient (spec 1.2, 1.4).

With u(h) the last update as a function of its hyperparameters, at its stored inputs, the signal is

  d loss / d h = [du/dh]^T g,   g = the gradient at the parameters that u led to.

No derivative of the model but g, which the train step has anyway. Three ways to get du/dh, with the same result:

  Closed   formulas of today's state (closed.py); no buffer, or one copy of the last gradient
  Tangent  du/dh is computed with the update (forward mode) and kept: one buffer for each keyword; any rule; may be traced
  Replay   the update's inputs are kept and the update is run again backwards; any rule, any number of keywords
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from metaopt.closed import decay_mask, find_form
from metaopt.rule import Rule, Values, probe_tree
from metaopt.safe import safe_sqrt


@dataclass(frozen=True)
class Trace:
    """How far back a signal looks: <g_t, sum over s of weight(s) du_s/dh>, the paths behind u_s being ignored.

    Attributes:
      gamma: weights gamma^(t-s). 0 is the paper (the last step alone); below 1 MetaOptimize's Hessian-free form; 1, with
        only the rate learned, Mechanic's signal.
      power: weights (s/t)^power instead, so that the horizon stays a fixed part of the run so far.
    """

    gamma: float = 0.0
    power: float | None = None

    def __post_init__(self):
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"Trace(gamma={self.gamma}) must lie in [0, 1]")
        if self.power is not None and self.power < 0:
            raise ValueError(f"Trace(power={self.power}) must not be negative")

    def __bool__(self) -> bool:
        return self.gamma > 0 or self.power is not None

    def keep(self, count: jax.Array, dtype: Any) -> jax.Array | float:
        """What is left of the older terms when the term of update `count` (from 0) is added."""
        count = count.astype(dtype)
        return self.gamma if self.power is None else (count / (count + 1)) ** self.power


class ClosedMemory(NamedTuple):
    grads: Any  # () where no copy is needed


class TangentMemory(NamedTuple):
    tangents: dict[str, Any]


class ReplayMemory(NamedTuple):
    grads: Any
    base: Any
    params: Any  # () where the rule reads none


class Step(NamedTuple):
    """One update of the base rule, before guards."""

    updates: Any
    base: Any
    memory: Any


class Method(Protocol):
    """How du/dh is had. `raw`, `count` are those of the update that the memory is about."""

    def init(self, rule: Rule, params: Any) -> Any: ...

    def step(
        self, rule: Rule, raw: Values, count: jax.Array, grads, base, params, extra
    ) -> Step: ...

    def signal(self, rule: Rule, cotangent, memory, raw: Values, count, base, params) -> Values:
        """d loss / d raw, not yet summed over devices."""
        ...


@dataclass(frozen=True)
class Closed:
    needs_gradient: bool

    def init(self, rule, params):
        return ClosedMemory(optax.tree.zeros_like(params) if self.needs_gradient else ())

    def step(self, rule, raw, count, grads, base, params, extra):
        updates, base = rule.apply(rule.values(raw, count), grads, base, params, extra)
        return Step(updates, base, ClosedMemory(grads if self.needs_gradient else ()))

    def signal(self, rule, cotangent, memory, raw, count, base, params):
        found = find_form(rule.factory, rule.constants, rule.learned)
        assert found
        form = found[0]
        values, chain = jax.vjp(lambda r: rule.values(r, count), raw)
        leaves, names = jax.tree.leaves(cotangent), list(rule.learned)
        absent = [None] * len(leaves)
        g = jax.tree.leaves(memory.grads) if self.needs_gradient else absent
        w = absent if params is None else jax.tree.leaves(params)
        decays = absent if params is None else decay_mask(rule.constants, params)
        state = {
            k: [tree] * len(leaves) if k == "t" else jax.tree.leaves(tree)
            for k, tree in form.state_of(base).items()
        }
        dots: dict[str, list] = {name: [] for name in names}
        for i, own in enumerate(rule.of_leaves(values, cotangent)):
            h = {**form.defaults, **rule.constants, **own}
            leaf = {k: v[i] for k, v in state.items()}
            for name, tangent in form.tangents(h, names, leaf, g[i], w[i], decays[i]).items():
                dots[name].append(_dot(leaves[i], tangent, rule.dtype(cotangent)))
        return chain(rule.reduce(dots, cotangent))[0]


@dataclass(frozen=True)
class Tangent:
    trace: Trace
    safe: bool

    def init(self, rule, params):
        # A sum of many small terms needs float32; a single one is as good as the update itself.
        dtype = rule.dtype(params) if self.trace else None
        return TangentMemory(
            {name: optax.tree.zeros_like(params, dtype=dtype) for name in rule.learned}
        )

    def step(self, rule, raw, count, grads, base, params, extra):
        def updated(raw):
            return rule.apply(rule.values(raw, count), grads, base, params, extra)

        updated = safe_sqrt(updated) if self.safe else updated
        updates, by_raw, base = jax.linearize(updated, raw, has_aux=True)
        tangents = {}
        for name in rule.learned:
            # All entries of a vector at once: a leaf depends on its own group's entry alone.
            direction = jax.tree.map(jnp.zeros_like, raw) | {name: jnp.ones_like(raw[name])}
            tangents[name] = by_raw(direction)
        return Step(updates, base, TangentMemory(tangents))

    def signal(self, rule, cotangent, memory, raw, count, base, params):
        dtype, leaves = rule.dtype(cotangent), jax.tree.leaves(cotangent)
        dots = {
            name: [_dot(c, t, dtype) for c, t in zip(leaves, jax.tree.leaves(tangent), strict=True)]
            for name, tangent in memory.tangents.items()
        }
        return rule.reduce(dots, cotangent)


@dataclass(frozen=True)
class Replay:
    reads_params: bool
    safe: bool

    def init(self, rule, params):
        zeros = optax.tree.zeros_like(params)
        return ReplayMemory(zeros, rule.init(params), zeros if self.reads_params else ())

    def step(self, rule, raw, count, grads, base, params, extra):
        updates, new = rule.apply(rule.values(raw, count), grads, base, params, extra)
        return Step(updates, new, ReplayMemory(grads, base, params if self.reads_params else ()))

    def signal(self, rule, cotangent, memory, raw, count, base, params):
        params = memory.params if self.reads_params else None

        def updates(raw):
            return rule.apply(rule.values(raw, count), memory.grads, memory.base, params, {})[0]

        _, pull = jax.vjp(safe_sqrt(updates) if self.safe else updates, raw)
        return pull(cotangent)[0]


def choose(rule: Rule, mode: str, trace: Trace, safe: bool) -> Method:
    """The method `mode` names; "auto" takes the one with the least memory, closed forms first."""
    if mode not in ("auto", "closed", "tangent", "replay"):
        raise ValueError(f'mode={mode!r}: give "auto", "closed", "tangent" or "replay"')
    form = find_form(rule.factory, rule.constants, rule.learned)
    if trace and mode not in ("auto", "tangent"):
        raise ValueError(
            f'mode={mode!r} keeps no tangents to trace; use mode="tangent", or Trace(gamma=0)'
        )
    if mode == "closed" and form is None:
        name = getattr(rule.factory, "__name__", str(rule.factory))
        raise ValueError(f'no closed form of {name} by {", ".join(rule.learned)}; use mode="auto"')
    if form and (mode == "closed" or (mode == "auto" and not trace)):
        return Closed(form[1])
    reads = _reads_params(rule)
    if mode == "replay" or (
        mode == "auto" and not trace and _replay_copies(rule, reads) < len(rule.learned)
    ):
        return Replay(reads, safe)
    return Tangent(trace, safe)


def pack_sum(signals: Values, axis_name: Any) -> Values:
    """Sums all signals over a manual mesh axis, in one collective."""
    if axis_name is None:
        return signals
    flat, unpack = ravel_pytree(signals)
    return unpack(jax.lax.psum(flat, axis_name))


def _dot(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    return total(a.astype(dtype) * b.astype(dtype))


def total(x: jax.Array) -> jax.Array:
    """The sum of an array. XLA's CPU compiler adds one number at a time, but multiplies matrices in vectors."""
    if x.ndim == 0:
        return x
    ones = jnp.ones(x.shape[-1], x.dtype)
    return jax.lax.platform_dependent(x, cpu=lambda x: jnp.sum(x @ ones), default=jnp.sum)


def _reads_params(rule: Rule) -> bool:
    """Whether the update refuses to go without parameters, as weight decay does."""
    try:
        _shapes(rule, None)
    except Exception:
        return True
    return False


def _replay_copies(rule: Rule, reads_params: bool) -> float:
    """The memory of Replay, in copies of the parameters."""
    try:
        size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
        state = size(jax.eval_shape(rule.init, probe_tree())) / size(probe_tree())
    except Exception:  # a factory for one particular model
        return float("inf")
    return 1 + int(state) + reads_params


def _shapes(rule: Rule, params: Any) -> Any:
    tree = probe_tree()
    values = {k: jax.ShapeDtypeStruct((), jnp.float32) for k in rule.learned}
    state = jax.eval_shape(rule.init, tree)
    return jax.eval_shape(lambda v, g, s: rule.apply(v, g, s, params, {}), values, tree, state)
