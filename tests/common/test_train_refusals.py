"""The train loop: what NaN leaves behind, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.checkpoint import Checkpointer
from common.mesh import MeshSpec, make_mesh
from common.state import init_state
from common.train_loop import NonFiniteLoss, TrainSpec
from common.train_step import diagnose, make_train_step
from tests.common.line import (
    WIDTH,
    EndlessGradient,
    Line,
    assert_same_bits,
    batches,
    host_batch,
    rows,
    run,
    saved,
)

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_microbatches_equal_one_batch(accumulate):
    recipe = Line(drop=0.0)  # each microbatch has noise of its own
    state = init_state(recipe, jax.random.key(0))
    batch = host_batch(0)
    whole, whole_metrics = jax.jit(make_train_step(recipe))(state, batch, 0)
    parts, metrics = jax.jit(make_train_step(recipe, accumulate))(state, batch, 0)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-5)
    mu = lambda s: s.opt_state[0].mu["w"]  # noqa: E731
    np.testing.assert_allclose(mu(parts), mu(whole), rtol=1e-5)  # Adam hides the gradient's size
    for name in ("loss", "grad_norm"):
        value = lambda m, name=name: m[name].sum / m[name].weight  # noqa: E731
        np.testing.assert_allclose(value(metrics), value(whole_metrics), rtol=1e-5)


NAN = {
    "logged at each step": {"log_every": 1, "save_every": 0},
    "seen by a later row": {"log_every": 3, "save_every": 0},
    "seen by a save": {"log_every": 0, "save_every": 7},
    "seen by an evaluation": {"log_every": 0, "save_every": 0, "eval_every": 6},
    "seen at the end": {"log_every": 0, "save_every": 0},
}


@pytest.mark.parametrize("every", NAN.values(), ids=NAN)
def test_nan_keeps_the_state_before_it_however_late_it_is_noticed(tmp_path, uninterrupted, every):
    poisoned = lambda start: batches(start, nan_at=(5,))  # noqa: E731
    with pytest.raises(NonFiniteLoss, match=r"step 5 is not finite.*the batch: x, y") as caught:
        run(tmp_path, 10, data=poisoned, **every)
    assert "config.optim.lr" in str(caught.value)
    assert_same_bits(saved(tmp_path), uninterrupted(5))
    found = rows(tmp_path) if (tmp_path / "metrics.jsonl").exists() else []
    assert all(row["step"] <= 5 for row in found), "rows of the frozen state"


@pytest.mark.slow
def test_a_run_stopped_by_nan_stops_there_again_and_goes_on_once_mended(tmp_path, uninterrupted):
    poisoned = lambda start: batches(start, nan_at=(5,))  # noqa: E731
    for _ in range(2):
        with pytest.raises(NonFiniteLoss, match="step 5"):
            run(tmp_path, 10, data=poisoned)
    assert_same_bits(run(tmp_path, 10), uninterrupted(10))


def test_nan_stops_a_run_before_it_can_replace_good_checkpoints(tmp_path):
    poisoned = lambda start: batches(start, nan_at=(4,))  # noqa: E731
    with pytest.raises(NonFiniteLoss):
        run(tmp_path, 10, data=poisoned, log_every=0, save_every=2)
    with Checkpointer(tmp_path / "checkpoints") as saver:
        assert saver.steps() == [2, 4]


def test_gradients_are_named_where_only_they_are_not_finite(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"step 0 .*first seen in gradients: w"):
        run(tmp_path, 3, recipe=EndlessGradient())
    assert int(saved(tmp_path).step) == 0


def test_diagnose_names_the_first_source():
    state = init_state(Line(), jax.random.key(0))
    good, nan = host_batch(0), jnp.full(WIDTH, jnp.nan)
    assert "not seen again" in diagnose(Line(), state, good)
    assert "parameters: w" in diagnose(Line(), state.replace(params={"w": nan}), good)
    extra = state.replace(extra={"average": {"w": nan}})
    assert "extra state: average/w" in diagnose(Line(), extra, good)
    huge = {"x": good["x"] * 1e30, "y": good["y"]}
    assert "loss terms: loss" in diagnose(Line(), state, huge)


def test_a_step_out_of_turn_changes_nothing_and_says_so():
    state = init_state(Line(), jax.random.key(0))
    after, metrics = jax.jit(make_train_step(Line()))(state, host_batch(0), 1)
    assert_same_bits(after, state)
    assert np.isnan(metrics["grad_norm"].sum)


@pytest.mark.parametrize(("batch", "accumulate", "multiple"), [(9, 1, 8), (12, 1, 8), (24, 6, 48)])
def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(batch, accumulate, multiple):
    mesh = make_mesh(MeshSpec(replica=2, fsdp=4))
    with pytest.raises(ValueError, match=f"train.batch={batch}.*multiple of {multiple}"):
        TrainSpec(steps=1, batch=batch, accumulate=accumulate).check_mesh(mesh)
    TrainSpec(steps=1, batch=multiple, accumulate=accumulate).check_mesh(mesh)
    tensor_only = make_mesh(MeshSpec(fsdp=1, tensor=8))
    TrainSpec(steps=1, batch=batch - batch % accumulate, accumulate=accumulate).check_mesh(
        tensor_only
    )


@pytest.mark.parametrize("name", ["log_every", "eval_every", "save_every", "profile_start"])
def test_a_negative_interval_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"train.{name}=-1"):
        TrainSpec(steps=1, batch=1, **{name: -1})


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch": 0}, {"accumulate": 0}, {"batch": 9}])
def test_sizes_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=r"at least 1|does not divide into train.accumulate=2"):
        TrainSpec(**{"steps": 1, "batch": 8, "accumulate": 2} | changes)


def test_compiling_is_announced_before_it_begins_and_timed_after(tmp_path, caplog):
    caplog.set_level("INFO", logger="triptych")
    run(tmp_path, 2)
    said = [m for m in caplog.messages if "compil" in m]
    assert len(said) == 2 and said[0].startswith("compiling the step") and said[1].endswith(" s")
