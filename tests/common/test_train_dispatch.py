"""Several steps in one program: the numbers of single steps, at the boundaries that the host keeps."""

import jax
import numpy as np
import pytest
from jax.tree_util import Partial

from common.config import ConfigError
from common.mesh import MeshSpec, make_mesh
from common.sharding import batch_sharding
from common.state import init_sharded, state_shardings
from common.train_loop import NonFiniteLoss, TrainSpec
from common.train_step import make_dispatch, make_train_step
from tests.common.line import Line, batches, host_batch, rows, run, saved

pytestmark = pytest.mark.usefixtures("compiled_once")
EVERY = {"log_every": 4, "eval_every": 8, "save_every": 4}


def assert_near(a, b):
    numbers = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype != jax.random.key(0).dtype]  # noqa: E731
    for x, y in zip(numbers(a), numbers(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
def test_rows_and_state_are_those_of_single_steps_also_after_a_stop(tmp_path):
    single, several = tmp_path / "single", tmp_path / "several"
    want = run(single, 16, **EVERY)
    run(several, 8, steps_per_dispatch=4, **EVERY)
    got = run(several, 16, steps_per_dispatch=4, **EVERY)
    assert_near(got, want)
    theirs = [
        r for r in rows(single) if r["step"] != 8 or "loss" not in r
    ]  # 8 was the first run's last
    ours = [r for r in rows(several) if r["step"] != 8 or "loss" not in r]
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == [1, 5, 8, 9, 13, 16, 16]
    for a, b in zip(ours, theirs):
        assert a == pytest.approx(b, rel=2e-6)


@pytest.mark.slow
def test_nan_inside_a_program_stops_the_run_at_its_own_step(tmp_path):
    poisoned = lambda start: batches(start, nan_at=(6,))  # noqa: E731
    with pytest.raises(NonFiniteLoss, match=r"step 6 is not finite, first seen in the batch: x"):
        run(tmp_path, 16, data=poisoned, steps_per_dispatch=4, **EVERY)
    assert int(saved(tmp_path).step) == 6
    with pytest.raises(
        ConfigError, match=r"is at step 6, which train.steps_per_dispatch=4 does not"
    ):
        run(tmp_path, 16, steps_per_dispatch=4, **EVERY)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_a_batch_is_prepared_inside_from_arrays_that_are_not_split(mode):
    mesh = make_mesh(MeshSpec(replica=2, fsdp=2, mode=mode), jax.devices()[:4])
    table = np.stack([host_batch(i)["x"] for i in range(4)]).reshape(-1, 4)
    _, sharding = state_shardings(Line(), mesh)

    def look_up(table, drawn):
        x = table[drawn["record"]]
        return {"x": x, "y": x.sum(1)}

    def trained(k, prepare, inputs):
        dispatch = jax.jit(make_dispatch(make_train_step(Line())), out_shardings=(sharding, None))
        with jax.set_mesh(mesh):
            state = init_sharded(Line(), jax.random.key(0), sharding)
            for i in range(0, 4, k):
                parts = jax.device_put(tuple(inputs[i : i + k]), batch_sharding(mesh))
                state, metrics = dispatch(state, parts, np.int32(i), prepare)
                assert metrics["loss"].sum.shape == (k,)
        return state

    records = [{"record": np.arange(8) + 8 * i} for i in range(4)]
    ready = [look_up(table, r) for r in records]
    want = trained(1, Partial(lambda batch: batch), ready)
    for k in (1, 2):
        assert_near(trained(k, Partial(look_up, table), records), want)


@pytest.mark.parametrize(
    "name", ["steps", "log_every", "eval_every", "save_every", "profile_start"]
)
def test_a_cadence_that_a_dispatch_does_not_divide_is_refused_by_name(name):
    good = {"steps": 8, "log_every": 4, "save_every": 0, "profile_start": 4, "profile_steps": 4}
    TrainSpec(batch=8, steps_per_dispatch=4, **good)
    with pytest.raises(ValueError, match=rf"steps_per_dispatch=4 does not divide {name}=6"):
        TrainSpec(batch=8, steps_per_dispatch=4, **{**good, name: 6})
