"""What a tower has learned, by name, for logs; and what its signals cost."""

from typing import Any

import jax

from metaopt.hyper import HyperState
from metaopt.signals import ClosedMemory, ReplayMemory

MODES = {ClosedMemory: "closed", ReplayMemory: "replay"}


def levels(opt_state: Any) -> list[HyperState]:
    """Every level of the first tower in an optimizer state, the lowest first. Raises ValueError if there is none."""

    def find(tree: Any) -> HyperState | None:
        leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, HyperState))
        return next((x for x in leaves if isinstance(x, HyperState)), None)

    found, tree = [], opt_state
    while (level := find(tree)) is not None:
        found.append(level)
        tree = level.by.unpack()
    if not found:
        raise ValueError("this optimizer state holds no metaopt.hyper(...)")
    return found


def learned(opt_state: Any) -> dict[str, jax.Array]:
    """{"learning_rate": value, "signal/learning_rate": d loss / d raw, "by/learning_rate": the level above's, ...}.

    Works inside jit, and on a state that contains the tower anywhere (chain, MultiSteps, masked). Values have a shape []
    or, where a keyword has a scope, [groups].
    """
    named = {}
    for height, level in enumerate(levels(opt_state)):
        prefix = "by/" * height
        named |= {f"{prefix}{name}": v for name, v in level.values.items()}
        named |= {f"{prefix}signal/{name}": h for name, h in level.signals.items()}
    return named


def describe(opt_state: Any) -> str:
    """A line for each level: what it learns, how its signal is had, and the extra memory. Takes abstract states, too."""
    lines = []
    for height, level in enumerate(levels(opt_state)):
        mode = MODES.get(type(level.memory), "tangent")
        extra = _bytes(level.memory) + _bytes(level.guard.rollback)
        base = _bytes(level.base)
        lines.append(
            f"level {height}: learns {', '.join(level.raw)}; {mode} signal, {extra:,} extra bytes beside the base "
            f"optimizer's {base:,}"
        )
    return "\n".join(lines)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
