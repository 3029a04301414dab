"""Hyperparameters that learn themselves by hypergradients, as optax transformations (Chandra et al., NeurIPS 2022).

  tx = metaopt.auto(optax.adamw)                                       # instead of optax.adamw(3e-4)
  tx = metaopt.hyper(optax.adamw, learning_rate=learn(1e-3), by=optax.sgd(0.02))
  tx = metaopt.hyper(optax.sgd, learning_rate=learn(1e-2), by=metaopt.hyper(optax.adam, learning_rate=learn(1e-3), by=...))

  optax.tree.get(state, "learning_rate")     # to log; metaopt.learned(state) has all there is to see

Read in this order: learn.py (what is learned), hyper.py (the algorithm), signals.py and closed.py (its gradients),
guards.py, auto.py (our defaults), paper.py (the paper's own optimizers), inspect.py (what to log).
"""

from metaopt.auto import auto
from metaopt.guards import Guards, Rollback
from metaopt.hyper import HyperState, hyper
from metaopt.inspect import describe, learned
from metaopt.learn import Bijector, Learn, learn
from metaopt.signals import Trace

__all__ = [
    "Bijector",
    "Guards",
    "HyperState",
    "Learn",
    "Rollback",
    "Trace",
    "auto",
    "describe",
    "hyper",
    "learn",
    "learned",
]
