"""Derivatives that stay finite where optimizers take square roots of zero."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def safe_sqrt(f: Callable) -> Callable:
    """`f` with the derivative of every square root at zero taken as zero; its values do not change.

    One weight that never got a gradient has v = 0, and sqrt'(0) * 0 = NaN would poison the signal of b2 for the whole
    model, although the weight did not move. Rewrites f's jaxpr, nested jits included, so it serves any factory.
    """

    def safe(*args: Any) -> Any:
        flat, treedef = jax.tree.flatten(args)
        out_tree = None

        def flat_f(*leaves):
            nonlocal out_tree
            out, out_tree = jax.tree.flatten(f(*jax.tree.unflatten(treedef, leaves)))
            return out

        closed = jax.make_jaxpr(flat_f)(*flat)
        assert out_tree is not None
        return jax.tree.unflatten(out_tree, _evaluate(closed.jaxpr, closed.consts, flat))

    return safe


def _evaluate(jaxpr: Any, consts: list, args: list) -> list:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name in _SAFE:
            outputs = [_SAFE[name](*inputs)]
        elif name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _safe(value: Callable, derivative: Callable) -> Callable:
    """A function whose derivative, a function of its own value, counts as zero at x = 0."""

    @jax.custom_jvp
    def f(x):
        return value(x)

    @f.defjvp
    def jvp(primals, tangents):
        (x,), (dx,) = primals, tangents
        y = value(x)
        return y, jnp.where(x == 0, 0, derivative(jnp.where(x == 0, 1, y))) * dx

    return f


_SAFE = {
    "sqrt": _safe(jax.lax.sqrt, lambda y: 0.5 / y),
    "rsqrt": _safe(jax.lax.rsqrt, lambda y: -0.5 * y**3),
}
