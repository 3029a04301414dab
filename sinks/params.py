"""Parameters: a nested dict of arrays, laid out by each family's `layout(config)`.

`layout` returns {"embed", "blocks": {...}, ...} of `Leaf`s. The leaves of "blocks" describe one block; the arrays have
all blocks stacked on a leading axis, for `lax.scan`. Kernels are [inputs, outputs]; heads lie head by head in a flat axis
(H * K or G * K); rotated features are two halves of a head's first `rotary_dim` features.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from common.sharding import Rules, shardings
from sinks import models
from sinks.config import ModelConfig
from sinks.models.layers import Leaf

Params = dict[str, Any]

# On top of FSDP over the width and TP over heads and hidden units, embeddings are split over the vocabulary.
RULES: Rules = {
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
}


def layout(config: ModelConfig) -> Params:
    """The family's tree of Leafs with the blocks' stacked: shapes [L, ...], axes ("layers", ...)."""
    tree = dict(models.family(config).layout(config))
    tree["blocks"] = {
        name: Leaf((config.depth, *leaf.shape), ("layers", *leaf.axes), leaf.init)
        for name, leaf in tree["blocks"].items()
    }
    return tree


def _map(config: ModelConfig, f: Callable[[Leaf], Any]) -> Params:
    return jax.tree.map(f, layout(config), is_leaf=lambda x: isinstance(x, Leaf))


def abstract(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """The parameters as shapes: what a loader has to fill."""
    return _map(config, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype))


def logical_axes(config: ModelConfig) -> Params:
    """The logical axes of every parameter; `RULES` maps them to mesh axes."""
    return _map(config, lambda leaf: leaf.axes)


def param_shardings(config: ModelConfig, mesh: Mesh, rules: Rules = RULES) -> Params:
    """NamedShardings of the parameters. Raises ValueError naming each that the mesh does not divide."""
    return shardings(abstract(config), logical_axes(config), mesh, rules)


def init(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters by GPT-NeoX's recipe (docs/papers/streamingllm.md 1.8): small_init N(0, 2 / 5D), and wang_init
    2 / (L sqrt(D)) for the products into the residual stream."""
    small = (2 / (5 * config.width)) ** 0.5
    wang = 2 / config.depth / config.width**0.5
    leaves, treedef = jax.tree.flatten(layout(config), is_leaf=lambda x: isinstance(x, Leaf))

    def sample(leaf: Leaf, key: jax.Array) -> jax.Array:
        if leaf.init in ("ones", "zeros"):
            return jnp.full(leaf.shape, float(leaf.init == "ones"), dtype)
        return (wang if leaf.init == "out" else small) * jax.random.normal(key, leaf.shape, dtype)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(treedef, [sample(leaf, k) for leaf, k in zip(leaves, keys)])


def fingerprint(params: Params) -> int:
    """A checksum of some numbers of every parameter, uint32, that tells weights of one shape apart.

    For parameters as they were loaded, before `stream.prepare`. In bfloat16, so that it is the same for both dtypes.
    """

    def sample(p):
        return p[tuple(slice(None, None, max(1, n // 8)) for n in p.shape)].astype(jnp.bfloat16)

    leaves = jax.tree.leaves(
        jax.device_get(jax.jit(lambda tree: jax.tree.map(sample, tree))(params))
    )
    return zlib.crc32(b"".join(leaf.tobytes() for leaf in leaves))
