"""The jitted train step, the same for every recipe."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from common.metrics import Metrics, mean, sum_metrics
from common.recipe import Recipe
from common.sharding import BATCH_AXES, batch_sharding, path_name, replicated
from common.state import TrainState

Step = Callable[[TrainState, dict, jax.Array], tuple[TrainState, Metrics]]


def make_train_step(recipe: Recipe, accumulate: int = 1) -> Step:
    """step(state, batch, expected) -> (state, metrics), a pure function to jit with the state donated.

    `expected` is the step the caller believes it is at. Once a loss or gradient is not finite the state stops moving,
    its step included; later calls then find `state.step != expected`, change nothing either, and report a NaN
    `grad_norm`. So the last good state survives all that the host has already dispatched, and the host notices
    however rarely it looks.

    Args:
      recipe: see common/recipe.py.
      accumulate: microbatches per update; the batch's leading axis is split into that many parts.
    """

    def gradients(state: TrainState, batch: dict, key: jax.Array):
        grad_fn = jax.value_and_grad(recipe.loss, has_aux=True)
        if accumulate == 1:
            (_, metrics), grads = grad_fn(state.params, state.extra, batch, key)
            return grads, metrics
        parts = jax.tree.map(lambda x: _split(x, accumulate), batch)

        def add(so_far, part):
            i, microbatch = part
            (_, metrics), grads = grad_fn(
                state.params, state.extra, microbatch, jax.random.fold_in(key, i)
            )
            return jax.tree.map(jnp.add, so_far, grads), metrics

        # A loop of the program: laid out one after the other, CPU runs microbatches side by side, at the whole
        # batch's memory and more.
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, metrics = jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))
        return jax.tree.map(lambda g: g / accumulate, grads), sum_metrics(metrics)

    def step(state: TrainState, batch: dict, expected: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, metrics = _placed_like(state.params, gradients)(state, batch, key)
        grad_norm = jnp.where(state.step == expected, optax.tree.norm(grads), jnp.nan)
        updates, opt_state = recipe.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        moved = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            extra=recipe.update_extra(state.extra, params, state.step),
        )
        good = jnp.isfinite(grad_norm)
        for metric in metrics.values():
            good &= jnp.isfinite(metric.sum)
        keep = jax.tree.map(
            lambda new, old: new if new is old else jnp.where(good, new, old), moved, state
        )
        logged = {k: mean(value) for k, value in recipe.log(keep.opt_state, state.step).items()}
        return keep, metrics | logged | {"grad_norm": mean(grad_norm)}

    return step


# From what the input pipeline gives to a batch: a jax.tree_util.Partial, so that it may hold arrays.
Prepare = Callable[[dict], dict]
AS_IT_IS: Prepare = jax.tree_util.Partial(lambda batch: batch)


def make_dispatch(step: Step) -> Callable[..., tuple[TrainState, Metrics]]:
    """dispatch(state, inputs, first, prepare) -> (state, metrics): K steps of `make_train_step` in one program.

    `inputs` has K pytrees of the input pipeline, for step `first` and those after it. `prepare` makes a batch of each
    inside the program. The metrics of every step are kept: their leaves are [K].
    """

    def dispatch(state: TrainState, inputs: tuple[dict, ...], first: jax.Array, prepare: Prepare):
        prepared: Prepare = prepare
        if jax.sharding.get_abstract_mesh().explicit_axes:
            prepared = cast(
                Prepare, jax.sharding.auto_axes(prepare, out_sharding=jax.P(BATCH_AXES))
            )

        def one(state: TrainState, numbered: tuple[jax.Array, dict]):
            i, batch = numbered
            return step(state, prepared(batch), first + i)

        if len(inputs) == 1:
            state, metrics = one(state, (jnp.int32(0), inputs[0]))
            return state, jax.tree.map(lambda x: x[None], metrics)
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *inputs)
        return jax.lax.scan(one, state, (jnp.arange(len(inputs)), stacked))

    return dispatch


@dataclass(frozen=True)
class Program:
    """How the step becomes a program.

    Attributes:
      prepare: makes a batch of what the input pipeline gives, inside the program.
      compiler_options: XLA's options by name; None for its defaults.
      after_compile: called once, when the program is compiled.
    """

    prepare: Prepare = AS_IT_IS
    compiler_options: Mapping[str, Any] | None = None
    after_compile: Callable[[], object] = lambda: None

    def jit(self, recipe: Recipe, accumulate: int, mesh: Mesh, sharding: TrainState) -> Any:
        """`make_dispatch` of the recipe's step, jitted; the state, placed by `sharding`, is donated."""
        one = replicated(mesh)
        return jax.jit(
            make_dispatch(make_train_step(recipe, accumulate)),
            in_shardings=(sharding, batch_sharding(mesh), one, one),
            out_shardings=(sharding, one),
            donate_argnums=0,
            compiler_options=dict(self.compiler_options or {}) or None,
        )


def _placed_like(params: Any, gradients: Callable) -> Callable:
    """`gradients` with the parameters' shardings, on a mesh with Explicit axes; models themselves run with Auto axes."""
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return gradients
    specs = jax.tree.map(lambda p: jax.typeof(p).sharding.spec, params)
    return jax.sharding.auto_axes(gradients, out_sharding=(specs, jax.P()))


def _split(x: jax.Array, parts: int) -> jax.Array:
    if x.shape[0] % parts:
        raise ValueError(
            f"a batch of {x.shape[0]} does not split into {parts} microbatches: change config.train.accumulate"
        )
    # Interleaved, so that every microbatch keeps a share of each device's rows.
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def diagnose(recipe: Recipe, state: TrainState, batch: dict) -> str:
    """Says where a step stops being finite: batch, parameters, loss terms, or which gradients. For error messages."""

    def bad(tree: Any) -> list[str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        floats = [(p, x) for p, x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        return [path_name(p) for p, x in floats if not bool(jnp.isfinite(x).all())]

    key = jax.random.fold_in(state.key, state.step)
    grad_fn = jax.jit(jax.value_and_grad(recipe.loss, has_aux=True))
    (_, metrics), grads = grad_fn(state.params, state.extra, batch, key)
    sums = {name: metric.sum for name, metric in metrics.items()}
    for what, tree in (
        ("the batch", batch),
        ("parameters", state.params),
        ("extra state", state.extra),
        ("loss terms", sums),
        ("gradients", grads),
    ):
        if names := bad(tree):
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            return f"first seen in {what}: {shown}"
    return "not seen again when the same step was run once more"
