"""What towers have learned, by name, for logs; and what their signals cost."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from optax import OptState

from metaopt.guards import OF_PEAK
from metaopt.hyper import HyperState
from metaopt.rule import named
from metaopt.signals import ClosedMemory, ReplayMemory

MODES = {ClosedMemory: "closed", ReplayMemory: "replay"}


def towers(opt_state: OptState) -> dict[str, list[HyperState]]:
    """Every tower in an optimizer state, its levels from the lowest up. Raises ValueError if there is none.

    Names are the labels that lead there (`optax.partition`'s), with "/" between; "" if there is one tower.
    """

    def is_level(x: Any) -> bool:
        return isinstance(x, HyperState)

    def find(tree: Any) -> list[tuple[Any, HyperState]]:
        found, _ = jax.tree.flatten_with_path(tree, is_leaf=is_level)
        return [(path, x) for path, x in found if is_level(x)]

    found = find(opt_state)
    if not found:
        raise ValueError("this optimizer state holds no metaopt.hyper(...)")
    out = {}
    for name, (_, level) in zip(_names([path for path, _ in found]), found):
        out[name] = [level]
        while above := find(_bare(out[name][-1].by).unpack()):
            out[name].append(above[0][1])
    return out


def _names(paths: list[Any]) -> list[str]:
    """A short name for each path."""
    if len(paths) == 1:
        return [""]
    labels = [[str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)] for path in paths]
    names = ["/".join(label) for label in labels]
    if "" in names or len(set(names)) < len(names):
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return names


def levels(opt_state: OptState) -> list[HyperState]:
    """Every level of the first tower in an optimizer state, the lowest first. Raises ValueError if there is none."""
    return next(iter(towers(opt_state).values()))


def learned(opt_state: OptState) -> dict[str, jax.Array]:
    """What is learned, by name. Works inside jit, and on a state that contains towers anywhere (chain, MultiSteps, masked).

      learning_rate            the value in the last update; the same for every keyword that is learned
      signal/learning_rate     d loss / d raw, the last hypergradient
      skipped/learning_rate    how many of its signals were not finite and counted as zero; as many as updates: it is
                               never learned
      skipped/by               how many steps of the upper optimizer were not finite and not taken
      skipped/update           how many updates of the parameters were not made: NaN in the loss that the rule reads, or,
                               with max_move, a number that is too large
      of_peak/learning_rate    the rate over its largest so far (since it was set, or rolled back), without its schedule;
                               below 1e-4 it has stalled, unless the loss is at its minimum; see `auto`
      by/...                   the same of the level above

    With several towers (`optax.partition`) each name begins with its label: "matrices/learning_rate". Values have a shape
    [] or, where a keyword has a scope, [groups].
    """
    out = {}
    for label, tower in towers(opt_state).items():
        for height, level in enumerate(tower):
            prefix = f"{label}/" * bool(label) + "by/" * height
            out |= {f"{prefix}{name}": v for name, v in _level(_bare(level)).items()}
    return out


def _level(level: HyperState) -> dict[str, jax.Array]:
    guard = level.guard
    seen = dict(level.values)
    seen |= {f"signal/{name}": h for name, h in level.signals.items()}
    seen |= {f"skipped/{name}": n for name, n in named(level.values, guard.skipped).items()}
    seen |= {"skipped/by": guard.refused, "skipped/update": guard.dropped}
    of_peak = {k: v for k, v in guard.peak.items() if k.startswith(OF_PEAK)}
    return seen | {f"of_peak/{name.removeprefix(OF_PEAK)}": v for name, v in of_peak.items()}


def describe(opt_state: OptState) -> str:
    """A line for each level: what it learns, how its signal is computed, its extra memory, and, if the state has numbers,
    what was never judged. Takes abstract states, too."""
    lines = []
    for label, tower in towers(opt_state).items():
        for height, level in enumerate(map(_bare, tower)):
            mode = MODES.get(type(level.memory), "tangent")
            extra = _bytes(level.memory) + _bytes(level.guard.rollback)
            base = _bytes(level.base)
            lines.append(
                f"{label}{', ' * bool(label)}level {height}: learns {', '.join(level.raw)}; {mode} signal, {extra:,} extra "
                f"bytes on top of the base optimizer's {base:,}{_skipped(level)}"
            )
    return "\n".join(lines)


def _skipped(level: HyperState) -> str:
    counts = {f"signals of {k}": n for k, n in named(level.values, level.guard.skipped).items()}
    counts["steps of the level above"] = level.guard.refused
    counts["updates of the parameters"] = level.guard.dropped
    if not all(isinstance(n, (jax.Array, np.ndarray)) for n in (*counts.values(), level.updates)):
        return ""
    if any(isinstance(n, Tracer) for n in counts.values()):
        return ""
    total = int(np.max(level.updates + level.guard.dropped))
    some = [
        f"; skipped {int(np.max(n))} of {total} {what}" for what, n in counts.items() if np.any(n)
    ]
    return "".join(some)


def _bare(tree: Any) -> Any:
    """Arrays without what a library has put around each (flax.nnx.Optimizer does)."""

    def around(x):
        return callable(getattr(x, "__jax_array__", None))

    return jax.tree.map(lambda x: x.__jax_array__() if around(x) else x, tree, is_leaf=around)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
