"""Closed-form derivatives of the last step of the usual update rules, from today's state (docs/papers/gdtuo.md 1.2).

Each rule is one function of a single array: given what the optimizer holds now, it returns d(last update)/d(keyword) for
the keywords that are learned. Only `Form.without_gradient` keywords can do without a copy of the last gradient.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import Params

from metaopt.ops import kept
from metaopt.rule import Rule, Values, real

H = Mapping[str, Any]  # keyword -> value, of one array


@dataclass(frozen=True)
class Form:
    """A rule's closed form.

    Attributes:
      tangents: (hyperparameters, names, leaf, g, w, decays) -> {name: array}. `leaf` holds the state's arrays that
        `state_of` names, `g` is the last gradient or None, `w` the present parameter or None, `decays` whether this
        array has weight decay.
      state_of: base state -> {name: tree, or an array that is not like the parameters}.
      defaults: of every keyword the form reads.  only: what other keywords must be for the form to hold.
      names: keywords it differentiates by.  without_gradient: those that need no copy of the last gradient.
    """

    tangents: Callable[..., dict[str, jax.Array]]
    state_of: Callable[[Any], H]
    defaults: dict[str, Any]
    only: dict[str, Any]
    names: frozenset[str]
    without_gradient: frozenset[str]


def _square(g: jax.Array) -> jax.Array:
    """|g|^2, which is what optax averages."""
    return jnp.real(g * jnp.conj(g))


def _sgd(h: H, names, leaf: H, g, w, decays) -> dict[str, jax.Array]:
    # b = mu b_prev + g;  u = -lr b,  with Nesterov -lr (g + mu b)
    mu, b = h["momentum"], leaf.get("b", g)
    if mu is None:
        return {"learning_rate": -g}
    if h["nesterov"]:
        forms = {
            "learning_rate": lambda: -(g + mu * b),
            "momentum": lambda: -h["learning_rate"] * (2 * b - g),
        }
    else:
        forms = {
            "learning_rate": lambda: -b,
            "momentum": lambda: -h["learning_rate"] * (b - g) / mu,
        }
    return {name: forms[name]() for name in names}


def _adam(h: H, names, leaf: H, g, w, decays) -> dict[str, jax.Array]:
    # u = -lr (mh / D + wd w),  mh = m / c1,  vh = v / c2,  c = 1 - b^t,  S = sqrt(vh + eps_root),  D = S + eps
    lr, b1, b2, wd = h["learning_rate"], h["b1"], h["b2"], h.get("weight_decay", 0.0)
    t = jnp.maximum(leaf["t"], 1).astype(jnp.result_type(lr))
    # w = (1 - lr wd) w_prev - lr direction is solved for w_prev; `off_one` sees to it that it can be.
    left = 1 - lr * wd
    if decays is not None:  # there are parameters
        least = near_one(w.dtype) / 2
        left = jnp.where(jnp.abs(left) < least, jnp.copysign(least, left), left)
    i1, i2, p1, p2, grow = kept(
        (1 / (1 - b1**t), 1 / (1 - b2**t), b1 ** (t - 1), b2 ** (t - 1), 1 / left)
    )
    mh, vh = leaf["m"] * i1, leaf["v"] * i2
    S = jnp.sqrt(vh + h["eps_root"])
    D = S + h["eps"]
    direction = mh / D
    decaying = decays and "weight_decay" in h

    def previous_w():
        return (w + lr * direction) * grow

    def d_lr():  # -direction - wd * previous_w(), with the direction once
        return -(1 + wd * grow * lr) * direction - (wd * grow) * w if decaying else -direction

    def d_b1():  # m_prev - g = (m - g) / b1
        return -(lr / D) * ((leaf["m"] - g) * (i1 / b1) + mh * t * p1 * i1)

    def d_b2():  # v_prev - g^2 = (v - g^2) / b2
        dvh = (leaf["v"] - _square(g)) * (i2 / b2) + vh * t * p2 * i2
        return jnp.where(S > 0, lr * mh / (D * D) * dvh / (2 * jnp.where(S > 0, S, 1)), 0.0)

    forms = {
        "learning_rate": d_lr,
        "b1": d_b1,
        "b2": d_b2,
        "eps": lambda: lr * mh / (D * D),
        "weight_decay": lambda: -lr * previous_w() if decays else jnp.zeros_like(w),
    }
    return {name: forms[name]() for name in names}


def _rmsprop(h: H, names, leaf: H, g, w, decays) -> dict[str, jax.Array]:
    # v = decay v_prev + (1 - decay) g^2;  u = -lr g r,  r = (v + eps)^(-1/2)
    lr, v = h["learning_rate"], leaf["v"]
    r = jax.lax.rsqrt(v + h["eps"])
    forms = {
        "learning_rate": lambda: -g * r,
        "decay": lambda: 0.5 * lr * g * r**3 * (v - _square(g)) / h["decay"],
        "eps": lambda: 0.5 * lr * g * r**3,
    }
    return {name: forms[name]() for name in names}


def _adagrad(h: H, names, leaf: H, g, w, decays) -> dict[str, jax.Array]:
    # G = G_prev + g^2;  u = -lr g r,  r = (G + eps)^(-1/2), and 0 where G is
    lr, G = h["learning_rate"], leaf["G"]
    r = jnp.where(G > 0, jax.lax.rsqrt(G + h["eps"]), 0.0)
    forms = {"learning_rate": lambda: -g * r, "eps": lambda: 0.5 * lr * g * r**3}
    return {name: forms[name]() for name in names}


def _adam_state(state: Any) -> dict[str, Any]:
    return {"t": state[0].count, "m": state[0].mu, "v": state[0].nu}


_ADAM = {"learning_rate": None, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0}
_PLAIN_ADAM = {"mu_dtype": None, "nesterov": False}

FORMS: dict[Any, Form] = {
    optax.adam: Form(
        _adam, _adam_state, _ADAM, _PLAIN_ADAM,
        frozenset({"learning_rate", "b1", "b2", "eps"}), frozenset({"learning_rate", "eps"}),
    ),
    optax.adamw: Form(
        _adam, _adam_state, {**_ADAM, "weight_decay": 1e-4, "mask": None}, _PLAIN_ADAM,
        frozenset({"learning_rate", "b1", "b2", "eps", "weight_decay"}), frozenset({"learning_rate", "eps", "weight_decay"}),
    ),
    optax.sgd: Form(
        _sgd, lambda s: {"b": s[0].trace} if isinstance(s[0], optax.TraceState) else {},
        {"learning_rate": None, "momentum": None, "nesterov": False}, {"accumulator_dtype": None},
        frozenset({"learning_rate", "momentum"}), frozenset(),
    ),
    optax.rmsprop: Form(
        _rmsprop, lambda s: {"v": s[0].nu}, {"learning_rate": None, "decay": 0.9, "eps": 1e-8},
        {"eps_in_sqrt": True, "centered": False, "momentum": None, "nesterov": False, "bias_correction": False},
        frozenset({"learning_rate", "decay", "eps"}), frozenset(),
    ),
    optax.adagrad: Form(
        _adagrad, lambda s: {"G": s[0].sum_of_squares}, {"learning_rate": None, "eps": 1e-7}, {},
        frozenset({"learning_rate", "eps"}), frozenset(),
    ),
}  # fmt: skip


def find_form(factory: Any, constants: H, learned: Iterable[str]) -> tuple[Form, bool] | None:
    """(form, whether it needs the last gradient) of a factory called with these keywords; None if there is none."""
    form = FORMS.get(factory)
    if form is None or not set(learned) <= form.names:
        return None
    if any(constants.get(k, v) != v for k, v in form.only.items()):
        return None
    # A schedule in place of a number: the value of the last step is not known.
    if any(callable(constants.get(k)) for k in form.defaults if k != "mask"):
        return None
    heavy_ball = factory is optax.sgd and not constants.get("nesterov", False)
    if heavy_ball and {"momentum"} & constants.keys() and constants["momentum"] is not None:
        return form, False  # -b is in the state
    return form, not set(learned) <= form.without_gradient


def decay_mask(constants: H, params: Params) -> list[bool]:
    """Which leaves weight decay applies to."""
    mask = constants.get("mask")
    if mask is None:
        return [True] * len(jax.tree.leaves(params))
    mask = mask(params) if callable(mask) else mask
    return jax.tree.leaves(
        jax.tree.map(lambda m, sub: jax.tree.map(lambda _: m, sub), mask, params)
    )


def near_one(dtype: Any) -> float:
    """How near to 1 rate times decay may come: there, half of the digits of w_prev are left in w."""
    return float(jnp.finfo(real(dtype)).eps) ** 0.5


def off_one(rule: Rule, raw: Values, count: jax.Array, params: Params | None) -> Values:
    """Raw values with rate times decay kept off 1, where AdamW's update would leave nothing of the weights to solve for.

    The update itself then takes the other value, so what is differentiated is what was done; the rate (or the decay, if only
    that is learned) changes by less than 0.04 % next to float32 parameters, 9 % next to bfloat16 ones.
    """
    names = [n for n in ("learning_rate", "weight_decay") if n in rule.learned]
    if rule.factory is not optax.adamw or not names or not jax.tree.leaves(params):
        return raw
    h = {**FORMS[optax.adamw].defaults, **rule.constants, **rule.values(raw, count)}
    product = h["learning_rate"] * h["weight_decay"]
    band = max(near_one(x.dtype) for x in jax.tree.leaves(params))
    target = jnp.where(product < 1, 1 - band, 1 + band)
    inside = jnp.abs(1 - product) < band
    name = max(names, key=lambda n: raw[n].ndim)  # one for each group, where there are groups
    moved = rule.learned[name].scaled(raw[name], target / jnp.where(inside, product, 1))
    return raw | {name: jnp.where(inside, moved, raw[name])}
