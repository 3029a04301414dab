"""Sharding as three dictionaries: a parameter's logical axes, rules from names to mesh axes, and the mesh."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

Axes = tuple[str | None, ...]
Rules = Mapping[str, str | tuple[str, ...] | None]
Rows = tuple[tuple[int, int], ...]

# Parameters: FSDP over the width, tensor parallelism over heads and hidden layers. With mesh sizes of 1 the same
# rules are plain data parallelism.
PARAM_RULES: Rules = {
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    "patch": None,
    "predictor": None,
}

BATCH_AXES = ("replica", "fsdp")


def path_name(path) -> str:
    """A pytree key path as "a/b/c"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def logical_axes(abstract: Any, table: Mapping[str, Axes]) -> Any:
    """The logical axes of every leaf, looked up by the end of its path; a stacked leaf gets a leading "layers".

    Raises ValueError naming each leaf that the table does not cover, or whose rank it does not fit.
    """
    problems = []

    def lookup(path, leaf):
        name = path_name(path)
        # The longest matching end wins: "attention/out/kernel" over "kernel".
        best = max((end for end in table if f"/{name}".endswith(f"/{end}")), key=len, default=None)
        if best is None:
            problems.append(f"{name}: no entry in the table of logical axes")
            return ()
        extra = len(leaf.shape) - len(table[best])
        if extra not in (0, 1):
            problems.append(f"{name}: shape {leaf.shape} does not fit the axes {table[best]}")
        return ("layers",) * extra + table[best]

    tree = jax.tree_util.tree_map_with_path(lookup, abstract)
    if problems:
        raise ValueError("logical axes: " + "; ".join(problems))
    return tree


def partition_spec(axes: Axes, rules: Rules = PARAM_RULES) -> PartitionSpec:
    """Maps logical names to mesh axes. Raises ValueError on an unknown name or a mesh axis used twice."""
    unknown = [a for a in axes if a is not None and a not in rules]
    if unknown:
        raise ValueError(f"logical axes {unknown} have no rule; known: {', '.join(rules)}")
    spec = [rules[a] if a is not None else None for a in axes]
    used = [m for s in spec for m in ((s,) if isinstance(s, str) else s or ())]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} map to {spec}: a mesh axis would split two of them")
    return PartitionSpec(*spec)


def shardings(abstract: Any, axes: Any, mesh: Mesh, rules: Rules = PARAM_RULES) -> Any:
    """NamedShardings for a tree of shapes with logical axes.

    Raises ValueError listing every parameter whose size does not divide by its mesh axes.
    """
    problems = []

    def one(path, leaf, names):
        spec = partition_spec(names, rules)
        for size, part in zip(leaf.shape, spec):
            ways = math.prod(
                mesh.shape[m] for m in ((part,) if isinstance(part, str) else part or ())
            )
            if size % ways:
                problems.append(
                    f"{path_name(path)} {leaf.shape}: {size} does not divide by {part}={ways}"
                )
        return NamedSharding(mesh, spec)

    tree = jax.tree_util.tree_map_with_path(
        one, abstract, axes, is_leaf=lambda x: hasattr(x, "shape")
    )
    if problems:
        raise ValueError(
            f"the mesh {dict(mesh.shape)} does not divide these parameters: "
            + "; ".join(problems)
            + ". Choose a smaller fsdp or tensor axis (config.mesh) and give the rest to replica."
        )
    return tree


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of scalars and small tables: a copy everywhere."""
    return NamedSharding(mesh, PartitionSpec())


def moved_to(mesh: Mesh, tree: Any) -> Any:
    """The arrays of `tree` as parts of `mesh`, which has their devices in their order, so that no data move."""

    def move(x: jax.Array) -> jax.Array:
        # A restored key carries the sharding of the numbers behind it, which have an axis more.
        assert isinstance(x.sharding, NamedSharding)
        spec = PartitionSpec(*x.sharding.spec[: x.ndim])
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(move, tree)


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """How many parts a batch's leading axis is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def rows_held(sharding: Sharding, batch: int) -> Rows:
    """The rows of a global batch that this process's devices hold: parts (start, stop) in order, neighbours joined.

    Where an axis of the mesh that does not split the batch, such as tensor, spans processes, those hold the same rows.

    Raises:
      ValueError: `batch` rows do not divide over the sharding, or none of its devices is this process's.
    """
    indices = sharding.addressable_devices_indices_map((batch,)).values()
    rows: list[tuple[int, int]] = []
    for start, stop in sorted({index[0].indices(batch)[:2] for index in indices if index}):
        if rows and rows[-1][1] == start:
            start = rows.pop()[0]
        rows.append((start, stop))
    if not rows:
        raise ValueError(
            f"process {jax.process_index()} has no device in the mesh, so it has no rows of the batch to read: give "
            "the mesh all devices"
        )
    return tuple(rows)


def to_host(tree: Any) -> Any:
    """The arrays of `tree` as whole numpy arrays on every process, however they are split over the mesh.

    Call on all processes at once: what one does not hold comes from the others.
    """
    if all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(tree)):
        return jax.tree.map(np.asarray, tree)
    everywhere = jax.tree.map(lambda x: replicated(x.sharding.mesh), tree)
    return jax.tree.map(np.asarray, jax.jit(lambda tree: tree, out_shardings=everywhere)(tree))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: the leading axis over replica and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))
