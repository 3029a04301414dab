"""Derivatives that stay finite where optimizers take roots of zero."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from metaopt.learn import lenient


def safe_roots(f: Callable) -> Callable:
    """`f` with the derivative of every root at zero taken as zero; its values do not change.

    One weight that never got a gradient has v = 0, and sqrt'(0) * 0 = NaN would poison the signal of b2 for the whole
    model, although the weight did not move. Rewrites f's jaxpr, and those inside it (jit, cond, scan, while), so it serves
    any factory. What has a derivative of its own (`jax.custom_jvp`, `jax.custom_vjp`) keeps that.
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
        return jax.tree.unflatten(out_tree, lenient(_evaluate)(closed.jaxpr, closed.consts, flat))

    return safe


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        name, params = eqn.primitive.name, eqn.params
        if name in _SAFE:
            outputs = [_SAFE[name](*inputs)]
        elif name in ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2"):
            inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
            if isinstance(inner, Jaxpr):
                outputs = _evaluate(inner, (), inputs)
            else:
                outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            if not name.startswith("custom_"):
                params = {k: _rewritten(v) for k, v in params.items()}
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _rewritten(param: Any) -> Any:
    """A parameter of a primitive, with the programs in it (branches, bodies of loops) made safe."""
    if isinstance(param, (tuple, list)):
        return type(param)(map(_rewritten, param)) if _holds_program(param) else param
    if not isinstance(param, ClosedJaxpr):
        return param
    return jax.make_jaxpr(lambda *args: _evaluate(param.jaxpr, param.consts, args))(*param.in_avals)


def _holds_program(params: Any) -> bool:
    return any(isinstance(p, ClosedJaxpr) for p in params)


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


def _power(x: Any, y: Any) -> Any:
    """x^y; roots are powers, too."""
    if not all(jnp.issubdtype(jnp.result_type(v), jnp.floating) for v in (x, y)):
        return jax.lax.pow(x, y)
    at_zero = (x == 0) & (y < 1)
    away = jax.lax.pow(jnp.where(at_zero, 1, x), y)
    return jnp.where(at_zero, jax.lax.pow(*map(jax.lax.stop_gradient, (x, y))), away)


_SAFE = {
    "sqrt": _safe(jax.lax.sqrt, lambda y: 0.5 / y),
    "rsqrt": _safe(jax.lax.rsqrt, lambda y: -0.5 * y**3),
    "cbrt": _safe(jax.lax.cbrt, lambda y: 1 / (3 * y * y)),
    "pow": _power,
}
