"""A recipe that fits a line, and its runs: what the tests of the train loop share."""

import itertools
import os
import signal
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.checkpoint import Checkpointer
from common.mesh import MeshSpec, make_mesh
from common.metrics import mean
from common.sharding import batch_sharding
from common.state import abstract_with_shardings, state_shardings
from common.train_loop import TrainSpec, train
from common.train_step import Program
from common.writers import JsonlWriter, read_metrics

BATCH, WIDTH = 8, 4


@dataclass(frozen=True)
class Line:
    """Least squares with dropout by the step's key, Adam, and an average of the weights as `extra`."""

    drop: float = 0.5

    def init(self, key):
        return {"w": jax.random.normal(key, (WIDTH,))}

    def init_extra(self, params):
        return {"average": jax.tree.map(jnp.copy, params)}

    tx = optax.adam(0.1)

    def loss(self, params, extra, batch, key):
        x = batch["x"]
        if self.drop:
            x = jnp.where(jax.random.bernoulli(key, self.drop, x.shape), x, 0)
        pull = ((params["w"] - extra["average"]["w"]) ** 2).sum()
        error = (x @ params["w"] - batch["y"]) ** 2
        return error.mean() + 0.1 * pull, {"loss": mean(error), "pull": mean(pull)}

    def update_extra(self, extra, params, step):
        m = step / (step + 1.0)
        blend = lambda a, p: m * a + (1 - m) * p  # noqa: E731
        return {"average": jax.tree.map(blend, extra["average"], params)}

    def param_axes(self, abstract):
        return jax.tree.map(lambda _: ("embed",), abstract)

    def extra_axes(self, abstract):
        return jax.tree.map(lambda _: ("embed",), abstract)

    def log(self, opt_state, step):
        return {"lr": 0.1 / (step + 1), "steps_of_adam": opt_state[0].count}


class EndlessGradient(Line):
    """Its loss is finite everywhere and its gradient nowhere: d sqrt(w) / dw at 0, times 0."""

    def loss(self, params, extra, batch, key):
        value, metrics = super().loss(params, extra, batch, key)
        return value + jnp.sqrt(params["w"] * 0).sum(), metrics


MESH = make_mesh(MeshSpec(), jax.devices()[:2])


def host_batch(step, nan_at=()):
    rng = np.random.default_rng((7, step))
    x = rng.standard_normal((BATCH, WIDTH)).astype(np.float32)
    if step in nan_at:
        x[3, 1] = np.nan
    return {"x": x, "y": x @ np.arange(WIDTH, dtype=np.float32)}


def batches(start, nan_at=(), before=lambda step: None):
    """A pure function of the step, but for `before`, which is called with each step that is asked for."""
    for step in itertools.count(start):
        before(step)
        yield jax.device_put(host_batch(step, nan_at), batch_sharding(MESH))


def averaged(state):
    yield "average", jnp.linalg.norm(state.extra["average"]["w"])


def run(
    workdir, steps, *, recipe=Line(), data=batches, evals=None, meta=None, program=Program(), **spec
):
    def open_writer(restored):
        writer = JsonlWriter(workdir / "metrics.jsonl")
        writer.resume_from(restored)
        return writer

    with Checkpointer(workdir / "checkpoints") as saver:
        state, _ = train(
            recipe,
            TrainSpec(steps=steps, batch=BATCH, **spec),
            mesh=MESH,
            batches=data,
            open_writer=open_writer,
            checkpointer=saver,
            workdir=workdir,
            meta=meta or {},
            evals={"eval": averaged} if evals is None else evals,
            program=program,
        )
    return state


def rows(workdir):
    clock = ("wall", "images_per_second")
    found = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in clock} for row in found]


def saved(workdir, recipe=Line()):
    abstract = abstract_with_shardings(*state_shardings(recipe, MESH))
    with Checkpointer(workdir / "checkpoints") as saver:
        found = saver.restore(abstract)
    assert found is not None
    return found[0]


def assert_same_bits(a, b):
    bits = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert np.asarray(bits(x)).tobytes() == np.asarray(bits(y)).tobytes()


def signal_at(step):
    return lambda s: os.kill(os.getpid(), signal.SIGTERM) if s == step else None


class Crash(Exception):
    pass


def crash_at(step):
    def check(s):
        if s == step:
            raise Crash

    return check


EVERY = {
    "each step": {"log_every": 1, "eval_every": 3, "save_every": 2},
    "rarely": {"log_every": 4, "eval_every": 5, "save_every": 3},
    "never but last": {"log_every": 0, "eval_every": 0, "save_every": 0},
}
