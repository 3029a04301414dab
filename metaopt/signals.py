"""Hypergradients: the last update's derivative by each hyperparameter, times the fresh gradient.

With u(h) the last update as a function of its hyperparameters, at its stored inputs, the signal is (docs/papers/gdtuo.md
1.2, 1.4)

  d loss / d h = [du/dh]^T g,   g = the gradient at the parameters that u led to.

No derivative of the model but g, which the train step has anyway. Three ways to get du/dh, with the same result:

  Closed   formulas of today's state (closed.py); no buffer, or one copy of the last gradient
  Tangent  du/dh is computed with the update (forward mode) and kept: one buffer for each keyword; any rule; may be traced
  Replay   the update's inputs are kept and the update is run again backwards; any rule, any number of keywords
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from optax import OptState, Params, Updates

from metaopt.closed import Form, decay_mask, find_form, off_one
from metaopt.guards import parts_of
from metaopt.learn import lenient
from metaopt.ops import kept, sum_all
from metaopt.rule import Rule, Values, named, needs_params, needs_value, probe_tree, real, row, wide
from metaopt.safe import safe_roots


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
        for name, value in (("gamma", self.gamma), ("power", self.power)):
            none = name == "power" and value is None
            if isinstance(value, bool) or not (isinstance(value, Real) or none):
                raise TypeError(f"Trace({name}={value!r}): give a number")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"Trace(gamma={self.gamma}) must lie in [0, 1]")
        if self.power is not None and not 0 <= self.power < math.inf:
            raise ValueError(f"Trace(power={self.power}) must be finite and not negative")

    def __bool__(self) -> bool:
        return self.gamma > 0 or self.power is not None

    def keep(self, count: jax.Array, dtype: Any) -> jax.Array | float:
        """What is left of the older terms when the term of update `count` (from 0) is added."""
        count = count.astype(dtype)
        return self.gamma if self.power is None else (count / (count + 1)) ** self.power

    def added(
        self, old: "TangentMemory", new: "TangentMemory", count: jax.Array
    ) -> "TangentMemory":
        """The memory with the term of update `count` (from 0).

        A derivative that is not finite makes the next signal so, which counts as zero, and is then forgotten: once added, it
        would stay forever.
        """

        @lenient
        def add(z, t):
            keep = kept(jnp.asarray(self.keep(count, real(z.dtype)), real(z.dtype)))
            return (keep * jnp.where(jnp.isfinite(z), z, 0) + t).astype(z.dtype)

        return new._replace(tangents=jax.tree.map(add, old.tangents, new.tangents))


class ClosedMemory(NamedTuple):
    grads: Updates  # () where no copy is needed


class TangentMemory(NamedTuple):
    tangents: tuple[Any, ...]  # a tree for each keyword, in the order of their names


class ReplayMemory(NamedTuple):
    grads: Updates
    base: OptState
    params: Params  # () where the rule reads none
    value: Any  # the loss; () where the rule reads none


class Step(NamedTuple):
    """One update of the base rule, before guards."""

    updates: Updates
    base: OptState
    memory: Any


class Mode(Protocol):
    """How du/dh is computed. `raw`, `count` are those of the update that the memory is about."""

    @property
    def reads_all(self) -> bool:
        """Whether a NaN in any number of the cotangent makes each signal that it belongs to NaN."""
        ...

    def init(self, rule: Rule, params: Params) -> Any: ...

    def settled(self, rule: Rule, raw: Values, count: jax.Array, params: Params | None) -> Values:
        """Raw values as update `count` takes them: where the method needs some room, a little off."""
        ...

    def step(
        self,
        rule: Rule,
        raw: Values,
        count: jax.Array,
        grads: Updates,
        base: OptState,
        params: Params | None,
        extra: Mapping[str, Any],
    ) -> Step: ...

    def shortened(self, memory: Any, factor: jax.Array) -> Any:
        """The memory of an update that, with its rate, was multiplied by `factor`."""
        ...

    def signal(
        self,
        rule: Rule,
        cotangent: Updates,
        memory: Any,
        raw: Values,
        count: jax.Array,
        base: OptState,
        params: Params | None,
    ) -> Values:
        """d loss / d raw, not yet summed over devices."""
        ...


@dataclass(frozen=True)
class Closed:
    form: Form
    needs_gradient: bool
    reads_all = True

    def init(self, rule, params):
        return ClosedMemory(optax.tree.zeros_like(params) if self.needs_gradient else ())

    def settled(self, rule, raw, count, params):
        return off_one(rule, raw, count, params)

    def step(self, rule, raw, count, grads, base, params, extra):
        raw = self.settled(rule, raw, count, params)
        updates, base = rule.apply(rule.values(raw, count), grads, base, params, extra)
        return Step(updates, base, ClosedMemory(grads if self.needs_gradient else ()))

    def shortened(self, memory, factor):
        return memory  # what is kept does not depend on the rate

    def signal(self, rule, cotangent, memory, raw, count, base, params):
        form, tangents = self.form, lenient(self.form.tangents)
        raw = self.settled(rule, raw, count, params)
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
            for name, tangent in tangents(h, names, leaf, g[i], w[i], decays[i]).items():
                dots[name].append(_dot(leaves[i], tangent, rule.dtype(cotangent)))
        return chain(rule.reduce(dots, cotangent))[0]


@dataclass(frozen=True)
class Tangent:
    trace: Trace
    safe: bool
    reads_all = True

    def init(self, rule, params):
        def zeros(x):
            # A sum of many small terms needs float32; a single one is as good as the update itself.
            return jnp.zeros_like(x, dtype=wide(x.dtype) if self.trace else None)

        return TangentMemory(tuple(jax.tree.map(zeros, params) for _ in rule.learned))

    def settled(self, rule, raw, count, params):
        return raw

    def step(self, rule, raw, count, grads, base, params, extra):
        def updated(raw):
            return rule.apply(rule.values(raw, count), grads, base, params, extra)

        updated = safe_roots(updated) if self.safe else updated
        updates, by_raw, base = jax.linearize(updated, raw, has_aux=True)
        tangents = {}
        for name in rule.learned:
            # All entries of a vector at once: a leaf depends on its own group's entry alone.
            direction = jax.tree.map(jnp.zeros_like, raw) | {name: jnp.ones_like(raw[name])}
            tangents[name] = by_raw(direction)
        return Step(updates, base, TangentMemory(row(tangents)))

    def shortened(self, memory, factor):
        return TangentMemory(scaled(factor, memory.tangents))

    def signal(self, rule, cotangent, memory, raw, count, base, params):
        dtype, leaves = rule.dtype(cotangent), jax.tree.leaves(cotangent)
        dots = {
            name: [_dot(c, t, dtype) for c, t in zip(leaves, jax.tree.leaves(tangent), strict=True)]
            for name, tangent in named(rule.learned, memory.tangents).items()
        }
        return rule.reduce(dots, cotangent)


@dataclass(frozen=True)
class Replay:
    reads_params: bool
    reads_value: bool
    safe: bool
    reads_all = False  # an array that does not depend on what is learned is not in the sums

    def init(self, rule, params):
        return ReplayMemory(
            optax.tree.zeros_like(params),
            rule.init(params),
            optax.tree.zeros_like(params) if self.reads_params else (),
            jnp.zeros((), rule.dtype(params)) if self.reads_value else (),
        )

    def settled(self, rule, raw, count, params):
        return raw

    def step(self, rule, raw, count, grads, base, params, extra):
        values = rule.values(raw, count)
        updates, new = rule.apply(values, grads, base, params, extra)
        value = jnp.asarray(extra["value"], rule.dtype(grads)) if self.reads_value else ()
        return Step(
            updates, new, ReplayMemory(grads, base, params if self.reads_params else (), value)
        )

    def shortened(self, memory, factor):
        return memory  # what is kept does not depend on the rate

    def signal(self, rule, cotangent, memory, raw, count, base, params):
        params = memory.params if self.reads_params else None
        extra = {"value": memory.value} if self.reads_value else {}

        def updates(raw):
            return rule.apply(rule.values(raw, count), memory.grads, memory.base, params, extra)[0]

        _, pull = jax.vjp(safe_roots(updates) if self.safe else updates, raw)
        return pull(jax.tree.map(jnp.conj, cotangent))[0]


def refuse_unkept(
    method: Mode,
    rule: Rule,
    values: Values,
    grads: Updates,
    base: OptState,
    params: Params | None,
    extra: Mapping[str, Any],
) -> None:
    """Raises ValueError if the update reads an extra argument that `Replay` cannot keep until the next update."""
    if not isinstance(method, Replay):
        return
    others = {k: v for k, v in extra.items() if not (k == "value" and method.reads_value)}
    arrays = {k: v for k, v in others.items() if not callable(v)}
    read = set()

    def spied(name, function):
        def spy(*args: Any, **kwargs: Any) -> Any:
            read.add(name)
            return function(*args, **kwargs)

        return spy

    functions = {k: spied(k, v) for k, v in others.items() if callable(v)}
    if not others:
        return

    def updates(arrays):
        return rule.apply(values, grads, base, params, {**extra, **arrays, **functions})

    try:
        jaxpr = jax.make_jaxpr(updates)(arrays).jaxpr
    except (TypeError, ValueError):  # an argument that is no array, so a constant of the program
        read |= arrays.keys()
    else:
        used = {v for eqn in jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")}
        used |= {v for v in jaxpr.outvars if not hasattr(v, "val")}
        inputs = iter(jaxpr.invars)
        for name, value in sorted(arrays.items()):
            if any(next(inputs) in used for _ in jax.tree.leaves(value)):
                read.add(name)
    if read:
        raise ValueError(
            f"the update reads the argument {sorted(read)[0]!r}, which the replay signal cannot keep until the next "
            'update; use mode="tangent"'
        )


def choose(rule: Rule, mode: str, trace: Trace, safe: bool) -> Mode:
    """The method `mode` names; "auto" takes the one with the least memory, closed forms first."""
    if mode not in ("auto", "closed", "tangent", "replay"):
        raise ValueError(f'mode={mode!r}: give "auto", "closed", "tangent" or "replay"')
    if not isinstance(trace, Trace):
        raise TypeError(
            f"trace={trace!r}: give Trace(gamma=...) or Trace(power=...); Trace() for none"
        )
    form = find_form(rule.factory, rule.constants, rule.learned)
    if trace and mode not in ("auto", "tangent"):
        raise ValueError(
            f'mode={mode!r} keeps no tangents to trace; use mode="tangent", or Trace(gamma=0)'
        )
    if mode == "closed" and form is None:
        name = getattr(rule.factory, "__name__", str(rule.factory))
        raise ValueError(f'no closed form of {name} by {", ".join(rule.learned)}; use mode="auto"')
    if form and (mode == "closed" or (mode == "auto" and not trace)):
        return Closed(*form)
    if mode == "tangent" or trace:
        return Tangent(trace, safe)
    reads, value = needs_params(rule), needs_value(rule)
    if mode == "replay" or _replay_copies(rule, reads, value) < len(rule.learned):
        return Replay(reads, bool(value), safe)
    return Tangent(trace, safe)


def pack_sum(signals: Values, axis_name: Any) -> Values:
    """Sums all signals over a manual mesh axis, in one collective."""
    if axis_name is None:
        return signals
    flat, unpack = ravel_pytree(signals)
    return unpack(jax.lax.psum(flat, axis_name))


def scaled(factor: jax.Array, tree: Any) -> Any:
    """`factor` times each array, whose types stay."""
    return jax.tree.map(lenient(lambda x: (factor * x).astype(x.dtype)), tree)


def _dot(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """The sum of Re(conj(a) b)."""
    pairs = zip(parts_of(a), parts_of(b))  # the other's imaginary part meets nothing if one is real
    return sum((sum_all(x.astype(dtype) * y.astype(dtype)) for x, y in pairs), jnp.zeros((), dtype))


def _replay_copies(rule: Rule, reads_params: bool, reads_value: bool | None) -> float:
    """The memory of Replay, in copies of the parameters; infinite where it does not know what to keep."""
    if reads_value is None:
        return float("inf")
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    state = size(jax.eval_shape(rule.init, probe_tree())) / size(probe_tree())
    return 1 + int(state) + reads_params
