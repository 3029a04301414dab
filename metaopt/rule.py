"""A base optimizer as a function of its learned hyperparameters."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import OptState, Params, Updates

from metaopt.learn import Learn, lenient
from metaopt.ops import kept

Values = dict[str, jax.Array]  # keyword -> its value: f[], or f[G] with one entry for each group
# The same without names, in their alphabetical order. In states, names belong to the values alone, so that
# optax.tree.get(state, "learning_rate") finds one thing.
Row = tuple[jax.Array, ...]


def row(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Values without their names."""
    return tuple(values[name] for name in sorted(values))


def named(names: Iterable[str], row: tuple[Any, ...]) -> dict[str, Any]:
    """Values with their names again; () gives none."""
    return dict(zip(sorted(names), row, strict=True)) if row else {}


@dataclass(frozen=True)
class Rule:
    """`factory(**constants, **values)`, where only the values are learned.

    The factory is called again inside each traced update: what is not learned stays a Python constant, so rounding,
    branches and integer arguments are those of plain optax.
    """

    factory: Callable[..., optax.GradientTransformation]
    constants: Mapping[str, Any]
    learned: Mapping[str, Learn]

    # Groups: the arrays that share a value.

    def groups(self, tree: Params) -> tuple[int, list[int]]:
        """(number of groups, the group of each leaf) of the keywords that have a scope."""
        scopes = [spec.scope for spec in self.learned.values() if not _is_global(spec.scope)]
        n = len(jax.tree.leaves(tree))
        if not scopes:
            return 1, [0] * n
        scope = scopes[0]
        if any(other is not scope and other != scope for other in scopes[1:]):
            raise ValueError(
                "all keywords with a scope must share one: pass the same labels to each"
            )
        if isinstance(scope, str):
            return n, list(range(n))
        labels = jax.tree.leaves(scope(tree) if callable(scope) else scope)
        if n and len(labels) != n:
            raise ValueError(
                f"scope has {len(labels)} labels for {n} arrays: give a label for each"
            )
        names = sorted(set(labels[:n]), key=str)
        return len(names), [names.index(label) for label in labels[:n]]

    def of_leaves(self, values: Values, tree: Params) -> list[Values]:
        """The values that each leaf of `tree` sees."""
        _, group = self.groups(tree)
        return [{name: v[g] if v.ndim else v for name, v in values.items()} for g in group]

    def reduce(self, per_leaf: Mapping[str, list[jax.Array]], tree: Params) -> Values:
        """Sums numbers of leaves to the shape of the values."""
        n, group = self.groups(tree)
        sums = {}
        for name, numbers in per_leaf.items():
            if _is_global(self.learned[name].scope):
                sums[name] = sum(numbers, jnp.zeros((), self.dtype(tree)))
            else:
                zeros = jnp.zeros((n,), self.dtype(tree))
                sums[name] = (
                    zeros.at[jnp.array(group, jnp.int32)].add(jnp.stack(numbers)) if n else zeros
                )
        return sums

    # Values.

    def dtype(self, tree: Params) -> Any:
        """The type of hyperparameters: float64 next to float64 parameters, else float32. Always real."""
        return wide(*(real(x.dtype) for x in jax.tree.leaves(tree)))

    def init_raw(self, params: Params) -> Values:
        n, _ = self.groups(params)
        return {
            name: jnp.full(
                () if _is_global(spec.scope) else (n,), spec.raw(spec.init), self.dtype(params)
            )
            for name, spec in self.learned.items()
        }

    def values(self, raw: Values, count: jax.Array) -> Values:
        return kept({name: spec.value(raw[name], count) for name, spec in self.learned.items()})

    def by_hand(
        self, raw: Values, values: Values, used: Values, count: jax.Array
    ) -> tuple[Values, dict[str, jax.Array]]:
        """(raw values, which of them were set): what `optax.tree.set(state, learning_rate=0.5)` asks for.

        `used` are the values of the last update, number `count`. What the keyword cannot be is not taken.
        """
        new, was_set = {}, {}
        for name, spec in self.learned.items():
            wanted = spec.raw_of(values[name], count)
            was_set[name] = (values[name] != used[name]) & jnp.isfinite(wanted)
            wanted = jnp.clip(wanted, *spec.raw_bounds()).astype(raw[name].dtype)
            new[name] = jnp.where(was_set[name], wanted, raw[name])
        return new, was_set

    def clip(self, raw: Values) -> Values:
        """Into the bounds."""
        return {
            name: jnp.clip(raw[name], *spec.raw_bounds()) for name, spec in self.learned.items()
        }

    # The optimizer.

    def init(self, params: Params) -> OptState:
        return self.built({name: spec.init for name, spec in self.learned.items()}).init(params)

    def apply(
        self,
        values: Values,
        grads: Updates,
        state: OptState,
        params: Params | None,
        extra: Mapping[str, Any],
    ) -> tuple[Updates, OptState]:
        """(updates, new state), of the types that plain optax gives them."""

        def updated(values: Mapping[str, Any]) -> tuple[Updates, OptState]:
            updates, new = self.built(values).update(grads, state, params, **extra)
            return _cast_like(updates, grads), _cast_like(new, state)

        n, group = self.groups(grads)
        if all(v.ndim == 0 for v in values.values()):
            return updated(values)
        # Every group's optimizer sees the whole tree (a global norm stays global), and each leaf keeps its own group's
        # result; the compiler drops the rest.
        results = [updated({k: v[g] if v.ndim else v for k, v in values.items()}) for g in range(n)]
        treedef = jax.tree.structure(grads)
        group_tree = jax.tree.unflatten(treedef, group)
        group_of_state = optax.tree_utils.tree_map_params(
            self.built({name: spec.init for name, spec in self.learned.items()}),
            lambda _, g: g, state, group_tree, transform_non_params=lambda _: 0,
        )  # fmt: skip

        def pick(g, *options):
            return options[g]

        updates = jax.tree.map(pick, group_tree, *(u for u, _ in results))
        return updates, jax.tree.map(pick, group_of_state, *(s for _, s in results))

    def built(self, values: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
        """The plain optimizer with these values; it takes any extra arguments."""
        tx = lenient(self.factory)(**self.constants, **values)
        update = optax.with_extra_args_support(tx).update
        return optax.GradientTransformationExtraArgs(lenient(tx.init), lenient(update))


def real(dtype: Any) -> Any:
    """The type of a number's real part."""
    return jnp.finfo(dtype).dtype if jnp.issubdtype(dtype, jnp.complexfloating) else dtype


def wide(*dtypes: Any) -> Any:
    """The type that holds all of these, float32 at least."""
    return lenient(jnp.result_type)(jnp.float32, *dtypes)


def _is_global(scope: Any) -> bool:
    return isinstance(scope, str) and scope == "global"


def _cast_like(new: Any, old: Any) -> Any:
    return jax.tree.map(
        lambda x, like: x.astype(like.dtype) if x.dtype != like.dtype else x, new, old
    )


def make_rule(
    factory: Callable[..., optax.GradientTransformation], kwargs: Mapping[str, Any]
) -> Rule:
    """Splits keywords into constants and learned ones, and refuses what cannot work (see `hyper`)."""
    if isinstance(factory, tuple):
        raise TypeError(
            f"hyper({factory!r}): give the factory, optax.adamw, not the transformation, optax.adamw(1e-3)"
        )
    if not callable(factory):
        raise TypeError(
            f"hyper({factory!r}): give the factory itself, as in hyper(optax.adamw, ...), not {type(factory).__name__}"
        )
    name = getattr(factory, "__name__", str(factory))
    learned = {k: v.resolved(k) for k, v in kwargs.items() if isinstance(v, Learn)}
    constants = {k: v for k, v in kwargs.items() if not isinstance(v, Learn)}
    if not learned:
        raise ValueError(
            f"hyper({name}): nothing to learn; mark a keyword, as in learning_rate=learn(1e-3)"
        )
    parameters = inspect.signature(factory).parameters
    takes = f"it takes {', '.join(parameters)}"
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if not open_ended and (unknown := [k for k in kwargs if k not in parameters]):
        raise TypeError(f"hyper({name}): {name} has no keyword {unknown[0]!r}; {takes}")
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise TypeError(f"hyper({name}): {error}; {takes}") from None
    for keyword, spec in learned.items():
        default = parameters[keyword].default if keyword in parameters else inspect.Parameter.empty
        if isinstance(default, (int, str)) or (callable(default) and not inspect.isclass(default)):
            kind = (
                "a function" if callable(default) else f"the {type(default).__name__} {default!r}"
            )
            raise TypeError(
                f"{keyword} of {name} cannot be learned: its default is {kind}, only real numbers can; pass "
                f"{keyword}={spec.init:g}"
            )
    rule = Rule(factory, constants, learned)
    if not open_ended:  # the names of a model's arrays say nothing about other shapes
        _probe(rule, name)
    return rule


def probe_tree() -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes that stand in for parameters."""
    return {
        "a": jax.ShapeDtypeStruct((4, 4), jnp.float32),
        "b": jax.ShapeDtypeStruct((4,), jnp.float32),
    }


def needs_value(rule: Rule) -> bool | None:
    """Whether the update refuses to go without the loss, `value=`. None: it wants more, such as a function; or another
    model than `probe_tree`."""
    for extra in ({}, {"value": jnp.zeros(())}):
        try:
            _trace_update(rule, probe_tree(), extra)
        except Exception:  # a factory may raise anything
            continue
        return bool(extra)
    return None


def needs_params(rule: Rule) -> bool:
    """Whether the update refuses to go without parameters, as weight decay does."""
    try:
        _trace_update(rule, None, {"value": jnp.zeros(())} if needs_value(rule) else {})
    except Exception:  # a factory may raise anything
        return True
    return False


def _trace_update(rule: Rule, params: Any, extra: Mapping[str, Any]) -> None:
    tree = probe_tree()
    tx = rule.built({name: spec.init for name, spec in rule.learned.items()})
    jax.eval_shape(
        lambda g, s, p: tx.update(g, s, p, **extra), tree, jax.eval_shape(rule.init, tree), params
    )


def _probe(rule: Rule, factory: str) -> None:
    """Traces one update on small shapes: can each keyword be a traced value, and does the update depend on it?"""
    tree = probe_tree()
    value = needs_value(rule)
    if value is None:  # found out when it meets its model, or its arguments
        return
    extra = {"value": jnp.ones(())} if value else {}

    def tangent(names):
        """The update's derivative by the named keywords, the others being constants."""
        rest = {k: s.init for k, s in rule.learned.items() if k not in names}

        def updates(values, grads, state, params):
            return rule.built({**rest, **values}).update(grads, state, params, **extra)[0]

        values = {k: jax.ShapeDtypeStruct((), jnp.float32) for k in names}
        state = jax.eval_shape(rule.init, tree)
        return jax.make_jaxpr(
            lambda v, dv, g, s, p: jax.jvp(lambda v: updates(v, g, s, p), (v,), (dv,))[1]
        )(values, values, tree, state, tree)

    for keyword in rule.learned:
        try:
            jaxpr = tangent((keyword,)).jaxpr
        except (jax.errors.JAXTypeError, TypeError, ValueError) as error:
            raise TypeError(
                f"{keyword} of {factory} cannot be learned: it must be a Python constant there "
                f"({type(error).__name__}); pass {keyword}={rule.learned[keyword].init:g}"
            ) from None
        reached = {jaxpr.invars[1]}
        for eqn in jaxpr.eqns:
            if any(not hasattr(v, "val") and v in reached for v in eqn.invars):
                reached.update(eqn.outvars)
        if not any(not hasattr(v, "val") and v in reached for v in jaxpr.outvars):
            _refuse(rule, factory, keyword)


def _refuse(rule: Rule, factory: str, keyword: str) -> None:
    """Says why an update does not depend on a keyword."""
    state = jax.eval_shape(rule.init, probe_tree())
    if optax.tree.get_all_with_path(state, "hyperparams"):
        raise ValueError(
            f"{keyword} of {factory}: inject_hyperparams keeps it in the optimizer state, where it cannot be learned; give "
            f"the factory without inject_hyperparams"
        )
    raise ValueError(
        f"{keyword} of {factory} has no one-step hypergradient: the update does not depend on it smoothly; "
        f"pass {keyword}={rule.learned[keyword].init:g}"
    )
