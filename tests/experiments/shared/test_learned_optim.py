"""`--config.optim.auto=true`: rate and weight decay learn themselves in the same train step, mesh and checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.mesh import MeshSpec, make_mesh
from common.metrics import compute
from common.sharding import batch_sharding, replicated
from common.state import init_sharded, state_shardings
from common.train_step import make_train_step
from experiments.jepa import pretrain as jepa_pretrain
from experiments.jepa.configs.scenes import get_config
from experiments.jepa.settings import resolve
from experiments.shared.run import Run
from jepa.recipe import AddMasks


def config(**optim):
    values = get_config("smoke")
    values.optim.update(auto=True, **optim)
    values.model.update(depth=1, predictor_depth=1)
    return values


def train(recipe, sizes: tuple[int, int, int], mode: str = "auto", steps: int = 4):
    mesh = make_mesh(MeshSpec(*sizes, mode=mode), jax.devices()[: int(np.prod(sizes))])
    _, sharding = state_shardings(recipe, mesh)
    step = jax.jit(make_train_step(recipe), out_shardings=(sharding, replicated(mesh)))
    rows = []
    with jax.set_mesh(mesh):
        state = init_sharded(recipe, jax.random.key(0), sharding)
        for i in range(steps):
            images = np.random.default_rng(i).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
            batch = AddMasks(recipe.masks, 0)({"image": images}, np.arange(8 * i, 8 * i + 8))
            state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)), jnp.int32(i))
            rows.append(compute(metrics))
    return state, rows


@pytest.fixture(scope="module")
def single():
    """Settings, and the rows of their recipe on one device."""
    values = config(clip=1.0)
    values.policy.compute = "float32"
    settings = resolve(values.to_dict(), 1000)
    return settings, train(settings.recipe, (1, 1, 1))[1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_eight_devices_learn_what_one_learns(single, mode):
    settings, rows = single
    eight, same = train(settings.recipe, (2, 4, 1), mode)
    optim = settings.optim
    assert 0.01 * optim.lr < rows[0]["lr"] <= optim.lr  # the first move is short
    assert rows[0]["weight_decay"] == pytest.approx(optim.weight_decay)
    for name in ("lr", "weight_decay"):
        assert len({row[name] for row in rows}) > 1, f"{name} moves"
    for a, b in zip(rows, same, strict=True):
        assert a == pytest.approx(b, rel=2e-3)
    of_rate, _ = eight.opt_state.memory.tangents
    kernel = of_rate["encoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert not kernel.sharding.is_fully_replicated, "tangents lie where their parameters lie"


@pytest.mark.slow
def test_a_run_logs_what_it_learned_and_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    quick = config()
    quick.train.eval_every, quick.probe.linear = 0, False  # what is tested is the training alone
    values = quick.to_dict()
    assert jepa_pretrain.run(Run(values, whole)) == 0
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "lr" in row]
    assert len(rates) == 3 and len(set(rates)) > 1
    # Stopped after two steps and started again: the same rates, from the checkpoint's.
    with pytest.MonkeyPatch.context() as patch:
        from common import train_loop

        save = train_loop.Checkpointer.save

        def save_and_die(self, step, *args, **kwargs):
            save(self, step, *args, **kwargs)
            if step == 2:
                raise KeyboardInterrupt

        patch.setattr(train_loop.Checkpointer, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            jepa_pretrain.run(Run(values, parts))
    assert jepa_pretrain.run(Run(values, parts)) == 0
    again = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in again if "lr" in row] == rates
