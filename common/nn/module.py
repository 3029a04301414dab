"""The wall around flax: the only file that splits and merges nnx modules.

A module is split once into a static graph definition and a nested dict of arrays. Everything outside sees
`init(key) -> params` and `apply(params, *inputs)`: two functions over plain pytrees that `jax.jit`, `jax.grad`,
`jax.vmap` and `jax.lax.scan` take as they are. Layer stacks are one module with stacked parameters, so a 40-block
encoder has as few leaves as one block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]


@dataclass(frozen=True)
class Module:
    """A layer as two pure functions. Build one with `define`."""

    ctor: Callable[[nnx.Rngs], nnx.Module]
    graphdef: Any
    abstract: Params

    def init(self, key: jax.Array) -> Params:
        """Draws fresh parameters: a nested dict of arrays."""
        return _arrays(nnx.split(self.ctor(nnx.Rngs(params=key)))[1])

    def __call__(self, params: Params, *inputs, **kwargs):
        """Applies the layer with `params` (as `init` returns them) to `inputs`."""
        return nnx.merge(self.graphdef, params)(*inputs, **kwargs)


def _arrays(state) -> Params:
    """A plain nested dict of arrays, free of flax types, so that checkpoints never depend on flax."""
    return jax.tree.map(jnp.asarray, nnx.to_pure_dict(state))


def define(ctor: Callable[[nnx.Rngs], nnx.Module]) -> Module:
    """Splits the module that `ctor(rngs)` builds into pure functions, without allocating parameters."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ctor(nnx.Rngs(params=jax.random.key(0)))))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(state)
    )
    return Module(ctor, graphdef, abstract)


def init_stack(module: Module, depth: int, key: jax.Array) -> Params:
    """Parameters of `depth` independent copies of `module`, stacked on a leading axis."""
    return jax.vmap(module.init)(jax.random.split(key, depth))


def scan_stack(
    apply: Callable[[Params, jax.Array], jax.Array],
    stacked: Params,
    x: jax.Array,
    *,
    unroll: int = 1,
    remat: bool = False,
) -> jax.Array:
    """Runs `x = apply(params[i], x)` over a stack of blocks.

    `unroll` blocks are laid out per loop turn: 1 keeps programs small (TPU), the full depth lets a CPU avoid copying
    each block's parameters out of the stack. `remat` recomputes a block's activations in the backward pass.
    """
    depth = jax.tree.leaves(stacked)[0].shape[0]
    body = jax.checkpoint(apply, prevent_cse=False) if remat else apply
    if unroll >= depth:
        # Unstacked at once, gradients are one concatenation; by indexing, each would be padded to the stack and added.
        leaves, structure = jax.tree.flatten(stacked)
        for block in zip(*map(jnp.unstack, leaves)):
            x = body(jax.tree.unflatten(structure, block), x)
        return x
    return jax.lax.scan(lambda x, p: (body(p, x), None), x, stacked, unroll=unroll)[0]
