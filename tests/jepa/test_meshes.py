"""One device equals eight: the same training on every mesh, and any mesh restores any checkpoint."""

from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.checkpoint import Checkpointer
from common.mesh import MeshSpec, make_mesh
from common.metrics import compute
from common.nn import ops
from common.nn.ops import Policy
from common.optim import OptimSpec, adamw
from common.sharding import BATCH_AXES, batch_sharding, replicated
from common.state import abstract_with_shardings, init_sharded, state_shardings
from common.train_step import make_train_step
from jepa.config import vit
from jepa.masks import MaskSpec
from jepa.recipe import AddMasks, EmaSpec, IJepa

STEPS, BATCH = 3, 16
MESHES = {"ddp": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 2), "fsdp_tensor": (2, 2, 2)}


def recipe(compute: str = "float32") -> IJepa:
    model = vit(
        "tiny", image=32, patch=4, width=64, depth=2, heads=4, hidden=128, predictor_width=32, predictor_depth=1,
        predictor_heads=2,
    )  # fmt: skip
    policy = Policy(compute=compute, unroll=1, batch_axes=BATCH_AXES)
    # A large eps: Adam's first steps otherwise turn rounding in tiny gradients into whole learning rates.
    tx, momentum = adamw(OptimSpec(lr=1e-3, eps=1e-3), 10), EmaSpec().schedule(10)
    return IJepa(model, MaskSpec(grid=model.grid), tx, momentum, policy=policy)


def batch(step: int) -> dict:
    images = np.random.default_rng(step).integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
    rows = np.arange(step * BATCH, (step + 1) * BATCH)
    return AddMasks(MaskSpec(grid=(8, 8)), 0)({"image": images}, rows)


def train(sizes: tuple[int, int, int], mode: str = "auto", r: IJepa | None = None):
    """Three steps on a mesh; (state, losses)."""
    r = r or recipe()
    mesh = make_mesh(MeshSpec(*sizes, mode=mode), jax.devices()[: int(np.prod(sizes))])
    _, sharding = state_shardings(r, mesh)
    step = jax.jit(
        make_train_step(r),
        out_shardings=(sharding, replicated(mesh)),
        donate_argnums=0,
        compiler_options=ops.compiler_options(mesh),
    )
    losses = []
    with jax.set_mesh(mesh):
        state = init_sharded(r, jax.random.key(0), sharding)
        for i in range(STEPS):
            state, metrics = step(
                state, jax.device_put(batch(i), batch_sharding(mesh)), jnp.int32(i)
            )
            losses.append(compute(metrics)["loss"])
    return state, losses


@pytest.fixture(scope="module")
def single():
    return train((1, 1, 1))


@pytest.mark.slow
def test_the_same_in_bfloat16():
    """CPU's own weight gradients included; rounding is all that differs."""
    one, eight = (train(sizes, r=recipe("bfloat16"))[1] for sizes in ((1, 1, 1), (2, 2, 2)))
    np.testing.assert_allclose(eight, one, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mode", [*[(name, "auto") for name in MESHES], ("fsdp_tensor", "explicit")]
)
def test_same_numbers_on_every_mesh(single, name, mode):
    state, losses = train(MESHES[name], mode)
    np.testing.assert_allclose(losses, single[1], rtol=2e-5)
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(single[0].params)):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=2e-5)
    kernel = state.params["encoder"]["blocks"]["mlp"]["up"]["kernel"]
    ways = MESHES[name][1] * MESHES[name][2]
    assert kernel.addressable_shards[0].data.size * ways == kernel.size  # really split
    mu = state.opt_state[0].mu["encoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert mu.sharding == kernel.sharding  # moments lie with their parameters


@pytest.mark.slow
def test_explicit_axes_refuse_what_auto_axes_move_silently():
    class Crossed(IJepa):  # adds a parameter to one that is split another way
        def update_extra(self, extra, params, step):
            block = params["encoder"]["blocks"]["attention"]
            return super().update_extra(extra, params, step) | {
                "crossed": block["out"]["kernel"] + jnp.swapaxes(block["out"]["kernel"], 1, 2)
            }

        def init_extra(self, params):
            kernel = params["encoder"]["blocks"]["attention"]["out"]["kernel"]
            return super().init_extra(params) | {"crossed": kernel}

        def extra_axes(self, abstract):
            axes = super().extra_axes({"target": abstract["target"]})
            return axes | {"crossed": axes["target"]["blocks"]["attention"]["out"]["kernel"]}

    plain = recipe()
    crossed = Crossed(**{f.name: getattr(plain, f.name) for f in fields(plain)})
    with pytest.raises(Exception, match="add got incompatible shardings"):
        train(MESHES["fsdp_tensor"], "explicit", crossed)


@pytest.mark.slow
def test_any_mesh_restores_any_checkpoint(single, tmp_path):
    state, _ = train(MESHES["fsdp_tensor"])
    with Checkpointer(tmp_path) as saver:
        saver.save(STEPS, state, {}, wait=True)
    for sizes in ((1, 1, 1), (1, 8, 1)):
        mesh = make_mesh(MeshSpec(*sizes), jax.devices()[: int(np.prod(sizes))])
        abstract, sharding = state_shardings(recipe(), mesh)
        with Checkpointer(tmp_path) as saver:
            restored = saver.restore(abstract_with_shardings(abstract, sharding))
        assert restored is not None
        for got, want in zip(jax.tree.leaves(restored[0].params), jax.tree.leaves(state.params)):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
            assert got.sharding.mesh.shape == mesh.shape
