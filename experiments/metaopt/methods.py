"""The methods that the metaopt experiments compare, by name: each from one initial rate, with one setting for all tasks."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import metaopt
from experiments.metaopt.grid import Method
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
    """Figure 4b: the same with the authors' initial rates for the levels above (docs/papers/gdtuo.md 3.5)."""

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


def figure2_tower(momentum: float) -> Callable[[float], optax.GradientTransformation]:
    """Figure 2: rate and momentum of SGD, each under SGD with a step size of its own (docs/papers/gdtuo.md 3.3)."""

    def make(rate: float) -> optax.GradientTransformation:
        upper = _each_by_sgd(learning_rate=1e-3 * rate**2, momentum=1e-6 / (1 - momentum))
        return _decayed(paper.sgd(rate, momentum, by=upper))

    return make


def figure3_tower(rate: float) -> optax.GradientTransformation:
    """Figure 3: rate and betas of Adam, each under SGD with a step size of its own (docs/papers/gdtuo.md 3.4)."""
    return paper.adam(rate, by=_each_by_sgd(learning_rate=1e-2 * rate, b1=1e-4, b2=2e-4))


def _each_by_sgd(**rates: float) -> optax.GradientTransformation:
    each: dict[Hashable, optax.GradientTransformation] = {
        name: _fixed_sgd(rate) for name, rate in rates.items()
    }
    return optax.partition(each, lambda params: {name: name for name in params})


def _decayed(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with figure 2's weight decay, as a part of the gradient."""
    return optax.chain(optax.add_decayed_weights(1e-4), tx)


def _momentum(momentum: float) -> Callable[[Any], optax.GradientTransformation]:
    return lambda rate: _decayed(optax.sgd(rate, momentum))


def cosine(part: jax.Array) -> jax.Array:
    """A factor from 1 to 0 over the run."""
    return 0.5 + 0.5 * jnp.cos(jnp.pi * part)


def steps(part: jax.Array) -> jax.Array:
    """A tenth after half of the run, a hundredth after three quarters: epochs 100 and 150 of 200 (He et al. 2016)."""
    return jnp.where(part < 0.5, 1.0, jnp.where(part < 0.75, 0.1, 0.01))


def _auto(factory: Any, **kwargs: Any) -> Callable[[float], optax.GradientTransformation]:
    return lambda rate: metaopt.auto(factory, learning_rate=rate, **kwargs)


def _greedy(factory: Any) -> Callable[[float], optax.GradientTransformation]:
    """Ours without the trace: the paper's one-step signal under our guards."""
    return lambda rate: metaopt.auto(factory, learning_rate=rate, trace=Trace())


def _metaoptimize(rate: float) -> optax.GradientTransformation:
    """MetaOptimize's Hessian-free form (docs/papers/gdtuo.md 1.4).

    AdamW under Lion, log rate, gamma 0.9999, meta rate 1e-3.
    """
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
    Method("cosine(sgd)", lambda r: optax.sgd(r), False, schedule=cosine),
    # Of SGD with momentum and weight decay.
    *[Method(f"momentum({mu})", _momentum(mu), False) for mu in (0.09, 0.9, 0.99)],
    *[Method(f"figure2_tower({mu})", figure2_tower(mu)) for mu in (0.09, 0.9, 0.99)],
    Method("steps(momentum(0.9))", _momentum(0.9), False, schedule=steps),
    Method("auto(momentum(0.9))", _auto(lambda learning_rate: _momentum(0.9)(learning_rate))),
    # Of Adam.
    Method("adam", lambda r: optax.adam(r), False),
    Method("cosine(adam)", lambda r: optax.adam(r), False, schedule=cosine),
    Method("auto(adam)", _auto(optax.adam)),
    Method("greedy(adam)", _greedy(optax.adam)),
    Method("tower1(adam)", lambda r: paper.adam_baydin(r, by=paper.sgd(1e-5))),
    Method("figure3_tower", figure3_tower),
    Method("metaoptimize", _metaoptimize),
    # From optax.contrib: the rate is each one's own initial guess (docs/papers/gdtuo.md 6.3: they are not exempt).
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
