"""Which keyword is learned, and in which coordinates: `learn(1e-3)` instead of `1e-3`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


@dataclass(frozen=True)
class Bijector:
    """Raw (unconstrained, what the upper optimizer moves) <-> value (natural units).

    Attributes:
      forward: raw -> value, of arrays.  inverse: (value, numpy or jax.numpy) -> raw.
      domain: the open interval of values.  bounds: where values are kept unless `learn` says otherwise.
    """

    name: str
    forward: Callable[[jax.Array], jax.Array]
    inverse: Callable[[Any, Any], Any]
    domain: tuple[float, float]
    bounds: tuple[float, float]


_INF = math.inf
BIJECTORS = {
    b.name: b
    for b in (
        # One unit of raw is a factor e for every task: the default for everything positive.
        Bijector("log", jnp.exp, lambda y, xp: xp.log(y), (0, _INF), (1e-12, 1e6)),
        # 1 - b2 changes by a factor, too. Nearer to 1, bias correction loses its digits in float32.
        Bijector("logit", jax.nn.sigmoid, lambda y, xp: xp.log(y / (1 - y)), (0, 1), (1e-3, 1 - 1e-5)),
        # The paper's own forms (docs/papers/gdtuo.md 1.3): a raw rate can turn negative, a squared one can get stuck at 0.
        Bijector("raw", lambda x: x, lambda y, xp: y, (-_INF, _INF), (-_INF, _INF)),
        Bijector("square", jnp.square, lambda y, xp: xp.sqrt(y), (0, _INF), (0, _INF)),
        Bijector("half_logit", lambda x: (jnp.tanh(x) + 1) / 2, lambda y, xp: xp.log(y / (1 - y)) / 2, (0, 1), (0, 1)),
    )
}  # fmt: skip

# Keywords of optax factories that are decay rates of averages, in (0, 1).
DECAYS = frozenset({"b1", "b2", "b3", "beta", "beta1", "beta2", "decay", "decay_rate", "momentum"})


@dataclass(frozen=True)
class Learn:
    """What `learn` returns; see there."""

    init: float
    bijector: Bijector | None
    scope: Any
    bounds: tuple[float, float] | None
    schedule: Callable[[Any], Any] | None

    def resolved(self, name: str) -> "Learn":
        """A copy with the defaults of keyword `name`; raises ValueError if the initial value does not fit."""
        bijector = self.bijector or BIJECTORS["logit" if name in DECAYS else "log"]
        low, high = self.bounds or bijector.bounds
        (least, most), value = bijector.domain, self.init
        if not least < value < most:
            remedy = 'bijector="raw"' if bijector.name == "log" else "another initial value"
            raise ValueError(
                f"{name}=learn({value}): the {bijector.name} bijector needs a value strictly between {least} and "
                f"{most}; use {remedy}"
            )
        if not (low == -_INF or low >= least) or not (high == _INF or high <= most):
            raise ValueError(
                f"{name}=learn({value}): bounds=({low}, {high}) reach beyond what the {bijector.name} bijector can give, "
                f"{least} to {most}; -inf and inf where there is none"
            )
        if not low <= value <= high:
            raise ValueError(f"{name}=learn({value}) starts outside its bounds ({low}, {high})")
        return Learn(value, bijector, self.scope, (low, high), self.schedule)

    def raw(self, value: float) -> float:
        """The raw side of a value."""
        assert self.bijector
        return float(self.bijector.inverse(value, np))

    def raw_bounds(self) -> tuple[float, float]:
        """The bounds on the raw side."""
        assert self.bijector and self.bounds  # resolved
        (least, most), (low, high) = self.bijector.domain, self.bounds
        return (self.raw(low) if low > least else -_INF, self.raw(high) if high < most else _INF)

    def scaled(self, raw: jax.Array, factor: jax.Array) -> jax.Array:
        """The raw side of `factor` times the value."""
        assert self.bijector
        return self.bijector.inverse(self.bijector.forward(raw) * factor, jnp)

    def unscheduled(self, raw: jax.Array) -> jax.Array:
        """The value, or with a schedule the factor in front of it."""
        assert self.bijector
        return self.bijector.forward(raw)

    def raw_of(self, value: jax.Array, count: jax.Array) -> jax.Array:
        """The raw side of a value at update number `count`; NaN or infinite where there is none.

        Where the schedule is at zero, as before a warm-up, the value is that of the next update.
        """
        assert self.bijector
        if self.schedule is not None:
            now, after = (self._factor(c, value.dtype) for c in (count, count + 1))
            value = value / jnp.where(now == 0, after, now)
        return self.bijector.inverse(value, jnp)

    def value(self, raw: jax.Array, count: jax.Array) -> jax.Array:
        """The value in natural units at update number `count`, the schedule's factor included."""
        assert self.bijector
        value = self.bijector.forward(raw)
        return value if self.schedule is None else value * self._factor(count, value.dtype)

    def _factor(self, count: jax.Array, dtype: Any) -> jax.Array:
        assert self.schedule
        return jnp.asarray(lenient(self.schedule)(count), dtype)


def learn(
    init: float,
    *,
    bijector: str | Bijector | None = None,
    scope: Any = "global",
    bounds: tuple[float, float] | None = None,
    schedule: Callable[[Any], Any] | None = None,
) -> Learn:
    """Marks a keyword of `hyper` as learned, from the initial value `init` on.

    Args:
      init: in natural units. With a schedule, of the factor in front of it (usually 1.0).
      bijector: "log" (the default for everything positive), "logit" (the default for decay rates such as b1), the paper's
        "raw", "square" (of a square root) and "half_logit", or a `Bijector`.
      scope: "global" (one value), "leaf" (one for each array of parameters), or labels: a pytree like the parameters, or a
        function from parameters to one; arrays with the same label share a value.
      bounds: (lower, upper); values are kept in this closed interval. Default: the bijector's.
      schedule: the factor form; the optimizer sees `schedule(count) * learned`, count from 0.

    Raises:
      ValueError, TypeError: what cannot be learned, here or in `hyper`, before anything is computed.
    """
    init = _number(init)
    if not math.isfinite(init):
        raise ValueError(f"learn({init}) is not finite")
    if isinstance(bijector, str):
        if bijector not in BIJECTORS:
            raise ValueError(f"bijector={bijector!r} is unknown; known: {', '.join(BIJECTORS)}")
        bijector = BIJECTORS[bijector]
    elif bijector is not None and not isinstance(bijector, Bijector):
        raise TypeError(f"bijector={bijector!r}: give a Bijector, or one of {', '.join(BIJECTORS)}")
    if bounds is not None:
        bounds = _pair(bounds)
    if isinstance(scope, str) and scope not in ("global", "leaf"):
        raise ValueError(
            f'scope={scope!r}: give "global", "leaf", a pytree of labels, or a function to one'
        )
    if schedule is not None and not callable(schedule):
        raise TypeError(f"schedule={schedule!r} is not a function of the update count")
    return Learn(init, bijector, scope, bounds, schedule)


def lenient(f: Callable) -> Callable:
    """`f` under jax's standard promotion of types, whatever the program around it has set: optax counts on it."""

    def standard(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return f(*args, **kwargs)

    return standard


def _number(init: Any) -> float:
    """One real number, of Python, numpy or jax."""
    if callable(init):
        raise TypeError(
            f"learn({getattr(init, '__name__', init)}): only a real number can be learned, not a function; "
            "learn(1.0, schedule=...) learns the factor in front of a schedule"
        )
    if isinstance(init, Tracer):
        raise TypeError(
            f"learn({init}): the initial value must be known when the optimizer is made, but it is traced here; "
            "make the optimizer outside jit, vmap and inject_hyperparams"
        )
    kind = np.dtype(type(init) if isinstance(init, (int, float)) else object)
    kind = getattr(init, "dtype", kind)
    real = jnp.issubdtype(kind, jnp.number) and np.ndim(init) == 0
    if isinstance(init, (bool, str)) or not real or jnp.issubdtype(kind, jnp.complexfloating):
        raise TypeError(
            f"learn({init!r}): only a real number can be learned, not {type(init).__name__}; leave other keywords "
            "as they are"
        )
    return float(init)


def _pair(bounds: Any) -> tuple[float, float]:
    try:
        low, high = bounds
        ordered = bool(low < high)
    except (TypeError, ValueError):
        raise TypeError(
            f"bounds={bounds!r}: give two numbers, (lower, upper); -inf and inf where there is none"
        ) from None
    if not ordered:
        raise ValueError(f"bounds={bounds}: the lower one must be below the upper one")
    return low, high
