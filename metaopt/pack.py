"""The states of a tower's upper levels as one array for each dtype.

A level holds some ten scalars, and a step takes and gives each array at some microseconds: fifty levels cost more in
handing over than in computing.
"""

import copyreg
import threading
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import Params, Updates

from metaopt.learn import lenient

Leaves = tuple[tuple[str, tuple[int, ...]], ...]


class _Arrays(NamedTuple):
    vectors: dict[str, jax.Array]
    others: tuple[Any, ...]


class _Layout(type):
    """The content of a `Packed`: its class says which tree it holds. A named tuple of arrays is what every way of saving
    knows, flax.serialization and orbax included."""

    structure: Any
    leaves: Leaves


class Packed(_Arrays, metaclass=_Layout):
    """A tree of small arrays, as a named tuple. Two of the same layout have the same class.

    Attributes:
      vectors: by the dtype's name and the tree's mark, its leaves flattened one after another, in the tree's order. The mark
        is of what the leaves are called: what loads a state by its names refuses that of another optimizer of this size.
      others: leaves that cannot be (PRNG keys), in order.
      structure: of the tree.  leaves: each one's dtype ("" among the others) and shape. Both belong to the class.
    """

    __slots__ = ()
    structure: Any
    leaves: Leaves
    mark: str

    def unpack(self) -> Any:
        """The tree. Axes that `jax.vmap` put before all arrays stay in front of each; shapes give shapes.

        Raises ValueError if the vectors are of another tower, restored by something that does not look at shapes.
        """
        if any(isinstance(v, jax.ShapeDtypeStruct) for v in self.vectors.values()):
            return jax.eval_shape(type(self).unpack, self)
        ends = dict.fromkeys(self.vectors, 0)
        for name, shape in self.leaves:
            if name:
                ends[name + self.mark] = ends.get(name + self.mark, 0) + int(np.prod(shape))
        sizes = {name: vector.shape[-1] for name, vector in self.vectors.items()}
        if ends != sizes:
            raise ValueError(
                f"the levels above were saved from another optimizer: they hold {sizes} numbers, this one {ends}"
            )
        others, starts, out = iter(self.others), dict.fromkeys(self.vectors, 0), []
        for name, shape in self.leaves:
            if not name:
                out.append(next(others))
                continue
            key = name + self.mark
            vector, start = self.vectors[key], starts[key]
            starts[key] = end = start + int(np.prod(shape))
            out.append(vector[..., start:end].reshape((*vector.shape[:-1], *shape)))
        return jax.tree.unflatten(self.structure, out)


_KNOWN: dict[tuple[Any, Leaves], type[Packed]] = {}
_LOCK = threading.Lock()


def _mark(structure: Any, leaves: Leaves) -> str:
    """The same in every process for the same names, dtypes and shapes."""
    paths, _ = jax.tree.flatten_with_path(jax.tree.unflatten(structure, range(len(leaves))))
    names = (jax.tree_util.keystr(path) for path, _ in paths)
    return f"_{zlib.crc32(repr([*zip(names, leaves)]).encode()):08x}"


def _layout(structure: Any, leaves: Leaves) -> type[Packed]:
    """The one class of this layout: two classes would be two structures to jax."""
    with _LOCK:
        if (structure, leaves) not in _KNOWN:
            mark = _mark(structure, leaves)
            members = {"__slots__": (), "structure": structure, "leaves": leaves, "mark": mark}
            _KNOWN[structure, leaves] = _Layout("Packed", (Packed,), members)
        return _KNOWN[structure, leaves]


# Copies of a state in another process find the class by its layout.
copyreg.pickle(_Layout, lambda c: "Packed" if c is Packed else (_layout, (c.structure, c.leaves)))


def pack(tree: Any) -> Packed:
    """The tree's leaves, packed."""
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    names = ["" if jnp.issubdtype(x.dtype, jax.dtypes.extended) else x.dtype.name for x in leaves]
    layout = _layout(structure, tuple((n, x.shape) for n, x in zip(names, leaves)))
    vectors = {
        name + layout.mark: jnp.concatenate(
            [x.reshape(-1) for x, n in zip(leaves, names) if n == name]
        )
        for name in dict.fromkeys(names)
        if name
    }
    others = tuple(x for x, name in zip(leaves, names) if not name)
    return layout(vectors, others)


def packed(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with a state of few arrays."""
    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> Packed:
        return pack(lenient(tx.init)(params))

    def update(
        updates: Updates, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Updates, Packed]:
        updates, new = lenient(tx.update)(updates, state.unpack(), params, **extra)
        return updates, pack(new)

    return optax.GradientTransformationExtraArgs(init, update)
