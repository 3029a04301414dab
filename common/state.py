"""TrainState: everything a run is, as one pytree of arrays."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from common.recipe import Recipe
from common.sharding import PARAM_RULES, Rules, replicated, shardings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step i32[] (updates done), params, opt_state, extra (EMA target, ...), key (typed; never changes)."""

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any
    key: jax.Array

    def replace(self, **changes) -> "TrainState":
        return replace(self, **changes)


def init_state(recipe: Recipe, key: jax.Array) -> TrainState:
    """The state before the first step. The key splits into one for parameters and one that steps fold into."""
    k_params, k_steps = jax.random.split(key)
    params = recipe.init(k_params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=recipe.tx.init(params),
        extra=recipe.init_extra(params),
        key=k_steps,
    )


def state_shardings(recipe: Recipe, mesh: Mesh, rules: Rules = PARAM_RULES) -> tuple[Any, Any]:
    """(abstract state, its shardings). Optimizer moments lie where their parameters lie."""
    abstract = jax.eval_shape(lambda: init_state(recipe, jax.random.key(0)))
    params = shardings(abstract.params, recipe.param_axes(abstract.params), mesh, rules)
    extra = shardings(abstract.extra, recipe.extra_axes(abstract.extra), mesh, rules)
    opt_state = optax.tree_utils.tree_map_params(
        recipe.tx,
        lambda _, sharding: sharding,
        abstract.opt_state,
        params,
        transform_non_params=lambda _: replicated(mesh),
    )
    rest = replicated(mesh)
    return abstract, abstract.replace(
        step=rest, params=params, opt_state=opt_state, extra=extra, key=rest
    )


def abstract_with_shardings(abstract: Any, tree: Any) -> Any:
    """Shapes that carry their shardings: what a checkpoint is restored against, on any mesh."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, tree
    )


def init_sharded(recipe: Recipe, key: jax.Array, state_sharding: TrainState) -> TrainState:
    """Initialises each shard on its own device: no host ever holds the whole state."""
    return jax.jit(lambda k: init_state(recipe, k), out_shardings=state_sharding)(key)
