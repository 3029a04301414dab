"""The paper's optimizers as configurations of `hyper`, equal to the released package (docs/papers/gdtuo.md 1.3).

Learned values have the package's raw forms, and there are no guards:

  sgd(0.01, by=sgd(0.01))                    # the paper's SGD / SGD
  adam(1e-3, by=sgd_per_param({"learning_rate": 1e-5, "b1": 1e-4}))

`by` is the optimizer above; None ends the tower, and what is below it is a plain optax optimizer.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from optax import OptState, Params

from metaopt.hyper import hyper
from metaopt.learn import learn

Tx: TypeAlias = optax.GradientTransformation


def _level(
    factory: Any, by: Tx | None, learned: dict[str, tuple[float, str]], **constants: Any
) -> Tx:
    """`factory` with its keywords (value, bijector) learned by `by`, or constant where there is none."""
    if by is None:
        return factory(**constants, **{name: value for name, (value, _) in learned.items()})
    marked: dict[str, Any] = {
        name: learn(value, bijector=form) for name, (value, form) in learned.items()
    }
    return hyper(factory, by=by, guards=None, **constants, **marked)


def sgd(learning_rate: float = 0.01, momentum: float = 0.0, by: Tx | None = None) -> Tx:
    """SGD; a momentum of exactly zero is off and stays off."""
    learned = {"learning_rate": (learning_rate, "raw")}
    if momentum:
        learned["momentum"] = (momentum, "raw")
    return _level(optax.sgd, by, learned)


def sgd_per_param(learning_rates: Mapping[str, float], by: Tx | None = None) -> Tx:
    """SGD with a rate for each named array, such as each hyperparameter of the level below; others do not move.

    An array's name is its path, with dots: "learning_rate", "fc1.weight".
    """

    def factory(**rates):
        def labels(params):
            name = lambda path, _: jax.tree_util.keystr(path, simple=True, separator=".")  # noqa: E731
            named = jax.tree_util.tree_map_with_path(name, params)
            return jax.tree.map(lambda n: n if n in rates else "", named)

        each = {name: optax.sgd(rate) for name, rate in rates.items()}
        return optax.partition({**each, "": optax.set_to_zero()}, labels)

    return _level(factory, by, {name: (rate, "raw") for name, rate in learning_rates.items()})


def adagrad(learning_rate: float = 0.01, by: Tx | None = None) -> Tx:
    """AdaGrad."""
    learned = {"learning_rate": (learning_rate, "raw")}
    return _level(optax.adagrad, by, learned, initial_accumulator_value=0.1, eps=1e-10)


def rmsprop(
    learning_rate: float = 0.01, decay: float = 0.99, by: Tx | None = None, learn_decay: bool = True
) -> Tx:
    """RMSProp by the square root of its rate; `learn_decay=False` is the package's RMSPropAlpha."""
    learned, constants = {"learning_rate": (learning_rate, "square")}, {"eps": 1e-8}
    if learn_decay:
        return _level(optax.rmsprop, by, {**learned, "decay": (decay, "half_logit")}, **constants)
    return _level(optax.rmsprop, by, learned, decay=decay, **constants)


def adam(
    learning_rate: float = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    by: Tx | None = None,
) -> Tx:
    """Adam."""
    learned = {
        "learning_rate": (learning_rate, "raw"),
        "b1": (b1, "half_logit"),
        "b2": (b2, "half_logit"),
    }
    return _level(_adam, by, learned, eps=eps)


def adam_baydin(
    learning_rate: float = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    by: Tx | None = None,
) -> Tx:
    """Adam with the rate alone learned (Baydin et al., 2018)."""
    return _level(_adam, by, {"learning_rate": (learning_rate, "raw")}, b1=b1, b2=b2, eps=eps)


def _adam(learning_rate: Any, b1: Any, b2: Any, eps: float) -> Tx:
    """optax.adam whose second moment starts at eps instead of 0, as the package's does."""
    tx = optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)

    def init(params: Params) -> OptState:
        state: Any = tx.init(params)
        first, *rest = state
        nu = jax.tree.map(lambda v: jnp.full_like(v, eps), first.nu)
        return (first._replace(nu=nu), *rest)

    return optax.GradientTransformation(init, tx.update)
