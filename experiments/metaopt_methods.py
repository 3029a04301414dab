"""The methods that the metaopt experiments compare, by name: each from one initial rate, with one setting for all tasks."""

from collections.abc import Callable
from typing import Any

import optax
from optax import contrib

import metaopt
from experiments.metaopt_grid import Method
from metaopt import Trace, learn, paper


def tower(height: int) -> Callable[[float], optax.GradientTransformation]:
    """Figure 4a: SGD under `height` more levels of SGD, all from the same rate."""

    def make(rate: float) -> optax.GradientTransformation:
        tx = _fixed_sgd(rate)
        for _ in range(height):
            tx = paper.sgd(rate, by=tx)
        return tx

    return make


def table_tower(height: int) -> Callable[[float], optax.GradientTransformation]:
    """Figure 4b: the same with the authors' initial rates for the levels above (spec 3.5)."""

    def make(rate: float) -> optax.GradientTransformation:
        upper = (100 * rate, rate, 0.01 * rate) if rate < 1e-3 else (1e-3 * rate, 1e-4 * rate, 1e-8)
        rates = [rate, *upper[:height]]
        tx = _fixed_sgd(rates[-1])
        for level in reversed(rates[:-1]):
            tx = paper.sgd(level, by=tx)
        return tx

    return make


def _fixed_sgd(rate: float) -> optax.GradientTransformation:
    """SGD whose rate is in its state, so that a grid of towers is one program."""
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)


def _auto(factory: Any, **kwargs: Any) -> Callable[[float], optax.GradientTransformation]:
    return lambda rate: metaopt.auto(factory, learning_rate=rate, **kwargs)


def _greedy(factory: Any) -> Callable[[float], optax.GradientTransformation]:
    """Ours without the trace: the paper's one-step signal under our guards."""
    return lambda rate: metaopt.auto(factory, learning_rate=rate, trace=Trace())


def _metaoptimize(rate: float) -> optax.GradientTransformation:
    """MetaOptimize's Hessian-free form (spec 1.4): AdamW under Lion, log rate, gamma 0.9999, meta rate 1e-3."""
    lion = optax.lion(1e-3, b1=0.9, b2=0.99, weight_decay=0.0)
    return metaopt.hyper(
        optax.adamw, learning_rate=learn(rate), by=lion, trace=Trace(gamma=0.9999), guards=None
    )


_ALL = [
    # What the rate is of SGD.
    Method("sgd", lambda r: optax.sgd(r), False),
    Method("auto(sgd)", _auto(optax.sgd)),
    Method("greedy(sgd)", _greedy(optax.sgd)),
    *[Method(f"tower{h}(sgd)", tower(h)) for h in range(1, 6)],
    *[Method(f"table_tower{h}(sgd)", table_tower(h)) for h in range(1, 4)],
    # Of Adam.
    Method("adam", lambda r: optax.adam(r), False),
    Method("auto(adam)", _auto(optax.adam)),
    Method("greedy(adam)", _greedy(optax.adam)),
    Method("tower1(adam)", lambda r: paper.adam_baydin(r, by=paper.sgd(1e-5))),
    Method("metaoptimize", _metaoptimize),
    # Of optax.contrib: the rate is each one's own initial guess (spec 6.3: they are not exempt).
    Method("prodigy", lambda r: contrib.prodigy(1.0, estim_lr0=r), False),
    Method("dadapt_adamw", lambda r: contrib.dadapt_adamw(1.0, estim_lr0=r), False),
    Method("mechanic(adam)", lambda r: contrib.mechanize(optax.adam(1e-3), s_init=r), False),
    Method(
        "schedule_free",
        lambda r: contrib.schedule_free_adamw(r),
        False,
        contrib.schedule_free_eval_params,
    ),
    Method("dog", lambda r: contrib.dog(1.0, init_step=("learning_rate", r)), False),
    Method("momo_adam", lambda r: contrib.momo_adam(r), False),
]


METHODS = {method.name: method for method in _ALL}
