"""The benchmark's networks and tasks: sizes as published, known answers, losses that fall, and plain errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.config import ConfigError
from common.nn.module import define
from common.results import make_row
from experiments.metaopt.grid import GridSpec, run_grid
from experiments.metaopt.grid_job import TaskSettings, check_batch, gaps, grid_table, open_task
from experiments.metaopt.methods import METHODS
from experiments.metaopt.pictures import by_rate, draw_grid
from experiments.metaopt.tasks.gpt import GPT
from experiments.metaopt.tasks.resnet import Normalizer, ResNet, augment, convolve_by_product
from experiments.metaopt.tasks.text import LSTM, CharRNN, windows

TINY = {
    "mlp": TaskSettings("mlp", "digits", hidden=8, examples=256),
    "resnet": TaskSettings("resnet", "digits", hidden=4, depth=8, examples=128),
    "charrnn": TaskSettings("charrnn", "embedded", hidden=16, depth=2, length=16, examples=128),
    "gpt": TaskSettings("gpt", "embedded", hidden=32, depth=2, length=16, examples=128),
}


def size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_sizes_are_the_papers():
    resnet20 = define(lambda rngs: ResNet(20, 16, 3, 10, rngs))
    assert size(resnet20.abstract) == 269_722  # He et al., table 6: 0.27 M
    V, H = 104, 128  # War and Peace's characters; two LSTM layers and the output
    rnn = define(lambda rngs: CharRNN(V, H, 2, rngs))
    assert size(rnn.abstract) == (V + H + 1) * 4 * H + (H + H + 1) * 4 * H + (H + 1) * V == 264_296


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_the_loss_falls(kind):
    task = open_task(TINY[kind])
    params = task.init(jax.random.key(0))
    batch = {name: jnp.asarray(x[:64]) for name, x in task.train.items()}
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(task.loss)(params, batch, jax.random.key(1))
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    losses, state = [], tx.init(params)
    for _ in range(15):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    classes = int(max(x.max() for name, x in task.train.items() if name != "x")) + 1
    assert losses[0] == pytest.approx(np.log(classes), rel=0.6)
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.isfinite(v) for v in jax.jit(task.score)(params).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "kernel", "strides", "padding"),
    [
        ((8, 8), (3, 3), (1, 1), "SAME"),
        ((8, 7), (3, 3), (2, 2), "SAME"),
        ((7, 9), (3, 2), (2, 1), "SAME"),
        ((5, 6), (1, 1), (2, 2), "SAME"),
        ((8, 7), (3, 3), (2, 2), "VALID"),
    ],
)
def test_convolution_by_products_is_xlas(size, kernel, strides, padding):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, *size, 3))
    w = jax.random.normal(keys[1], (*kernel, 3, 5))
    native = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected, pull = jax.vjp(native, x, w)
    got, pull_ours = jax.vjp(lambda x, w: convolve_by_product(x, w, strides, padding), x, w)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    dy = jax.random.normal(keys[2], expected.shape)
    for ours, theirs in zip(pull_ours(dy), pull(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_resnet_halves_twice_and_starts_as_its_head():
    """Shapes by stage; and a block whose second scale is zero is relu of its shortcut (option A)."""
    net = define(lambda rngs: ResNet(8, 4, 3, 10, rngs))
    params = net.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    logits, moments = net(params, x)
    assert logits.shape == (2, 10) and [m[0].shape[0] for m in moments] == [4, 4, 4, 8, 8, 16, 16]
    for block in params["blocks"].values():
        block["second"]["scale"] = jnp.zeros_like(block["second"]["scale"])
    stem = jax.nn.relu(
        Normalizer()(
            jax.lax.conv_general_dilated(
                x,
                params["stem"]["conv"]["kernel"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        )
    )
    pooled = jnp.pad(stem[:, ::4, ::4].mean((1, 2)), ((0, 0), (0, 12)))
    expected = pooled @ params["head"]["kernel"] + params["head"]["bias"][None]
    np.testing.assert_allclose(net(params, x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_batch_norm_with_its_own_moments_given_changes_nothing():
    net = define(lambda rngs: ResNet(8, 4, 3, 10, rngs))
    params = net.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    logits, moments = net(params, x)
    np.testing.assert_allclose(net(params, x, moments)[0], logits, rtol=1e-5)
    alone = net(params, x[:1], moments)[0]  # an image's logits no longer depend on its batch
    np.testing.assert_allclose(alone, logits[:1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="6n \\+ 2"):
        define(lambda rngs: ResNet(18, 16, 3, 10, rngs))


def test_augmentation_shifts_and_flips():
    """Every image is one of the 9 * 9 * 2 views that brute force makes of it, and many of them occur."""
    x_BHWC = np.random.default_rng(0).normal(size=(64, 32, 32, 1)).astype(np.float32)
    seen = set()
    for image, out in zip(x_BHWC, np.asarray(augment(jax.random.key(0), x_BHWC))):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        found = [
            (i, j, flip)
            for i in range(9)
            for j in range(9)
            for flip in (False, True)
            if np.array_equal(padded[i : i + 32, j : j + 32][:, :: -1 if flip else 1], out)
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 30 and {flip for *_, flip in seen} == {False, True}
    assert {i for i, *_ in seen} == set(range(9)) == {j for _, j, _ in seen}


def test_lstm_is_the_textbooks():
    """One step at a time, in float64 NumPy."""
    layer = define(lambda rngs: LSTM(3, 5, rngs))
    params = layer.init(jax.random.key(0))
    assert all(abs(leaf).max() <= 5**-0.5 for leaf in jax.tree.leaves(params))
    x_BTD = np.random.default_rng(0).normal(size=(2, 7, 3))
    w, u, b = (np.asarray(params[k], np.float64) for k in ("input", "recurrent", "bias"))
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    h, c = np.zeros((2, 5)), np.zeros((2, 5))
    outputs = layer(params, jnp.asarray(x_BTD, jnp.float32))
    for t in range(7):
        i, f, g, o = np.split(x_BTD[:, t] @ w + h @ u + b, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        np.testing.assert_allclose(outputs[:, t], h, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["charrnn", "gpt"])
def test_a_prediction_sees_only_the_past(kind):
    if kind == "gpt":
        gpt = GPT(vocabulary=11, length=8, width=32, depth=2)
        init, logits = gpt.init, gpt
    else:
        logits = define(lambda rngs: CharRNN(11, 8, 2, rngs))
        init = logits.init
    params = jax.tree.map(lambda p: 5 * p, init(jax.random.key(0)))
    ids = jnp.arange(8)[None] % 11
    changed = ids.at[0, 5].set(9)
    moved = abs(logits(params, ids) - logits(params, changed)).max((0, 2))
    assert (moved[:5] == 0).all() and (moved[5:] > 0).all()


def test_windows_predict_every_character_once(tmp_path):
    text = "".join(chr(ord("a") + i % 7) for i in range(103)) + "é€"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    count, (train, test) = windows(str(tmp_path / "text.txt"), 10, held_out=0.2)
    assert count == 9 and train.shape == (8, 11) and test.shape == (2, 11)
    assert (train[1:, 0] == train[:-1, -1]).all()
    letters = np.array(sorted(set(text)))
    assert "".join(letters[train[:, :-1].ravel()]) == text[:80]
    assert "".join(letters[test[0]]) == text[84:95]
    assert windows(str(tmp_path / "text.txt"), 10, 0.2, examples=3)[1][0].shape == (3, 11)


def test_a_schedule_covers_the_run(tmp_path):
    """A fall from rate to 0 by cosine over the run's steps, read from what the optimizer did with gradients of one."""
    task = dataclasses.replace(
        open_task(TINY["mlp"]),
        init=lambda key: {"w": jnp.zeros(())},
        loss=lambda params, batch, key: params["w"],
        score=lambda params: {"w": params["w"]},
    )
    spec = GridSpec(epochs=2, batch=64, rates=(0.5, 2.0))
    cells = run_grid(task, METHODS["cosine(sgd)"], spec, tmp_path)
    total = 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8)).sum()
    assert [cell.scores["w"] for cell in cells] == pytest.approx([-0.5 * total, -2 * total])
    steps = METHODS["steps(momentum(0.9))"].schedule
    at = [float(steps(jnp.asarray(part))) for part in (0, 0.49, 0.5, 0.74, 0.75, 0.99)]
    assert at == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (TaskSettings("charrnn", "no_such.txt", depth=2, length=9), "no_such.txt.*no file"),
        (TaskSettings("charrnn", "embedded", depth=0, length=9), "depth=0"),
        (TaskSettings("gpt", "embedded", depth=1, length=10**6), "too few for length=1000000"),
        (TaskSettings("gpt", "embedded", hidden=48, depth=1, length=9), "width 48.*multiple of 32"),
        (TaskSettings("resnet", "digits", hidden=4, depth=18), "depth 18: must be 6n"),
        (TaskSettings("resnet", "cifar11", depth=20), "cifar11"),
        (TaskSettings("mlp", "digits", "", 0), "hidden=0"),
    ],
)
def test_wrong_settings_are_one_plain_line(settings, said):
    with pytest.raises(ConfigError, match=said) as error:
        open_task(settings)
    assert str(error.value).startswith("config.task: ")


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="batch=300 is larger than the training set of digits"):
        check_batch(open_task(TINY["mlp"]), GridSpec(1, 300, (1.0,)))


def test_images_without_labels_are_refused(monkeypatch):
    from common.data import array_source
    from experiments.metaopt.tasks import mlp as metaopt_mlp

    unlabelled = array_source(image=np.zeros((4, 8, 8, 3), np.uint8), count=np.arange(4))
    monkeypatch.setattr(metaopt_mlp, "open_source", lambda *a: unlabelled)
    with pytest.raises(ConfigError, match="no image with a label, but image, count"):
        open_task(TINY["mlp"])


@pytest.mark.slow
def test_cells_in_turn_are_the_runs_side_by_side(tmp_path):
    task = open_task(TINY["charrnn"])
    spec = GridSpec(epochs=1, batch=32, rates=(1e-3, 1e-2), seeds=(0, 1))
    cells = [
        run_grid(
            dataclasses.replace(task, side_by_side=together),
            METHODS["auto(sgd)"],
            spec,
            tmp_path / str(together),
        )
        for together in (False, True)
    ]
    for one, other in zip(*cells):
        assert (one.rate, one.seed) == (other.rate, other.seed)
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "learns"),
    [
        ("figure2_tower(0.9)", {"learning_rate", "momentum"}),
        ("figure3_tower", {"learning_rate", "b1", "b2"}),
        ("auto(momentum(0.9))", {"learning_rate"}),
    ],
)
def test_towers_of_the_figures_learn(name, learns, tmp_path):
    """Each hyperparameter moves, by the step sizes of its initial rate (docs/papers/gdtuo.md 3.3, 3.4)."""
    spec = GridSpec(epochs=2, batch=32, rates=(1e-3, 1e-2))
    cells = run_grid(open_task(TINY["mlp"]), METHODS[name], spec, tmp_path)
    for cell in cells:
        assert cell.finite and learns <= cell.learned.keys()
        assert cell.learned["learning_rate"] != pytest.approx(cell.rate, rel=1e-7)


def grid_row(method: str, rate: float, error: float, diverged: bool = False):
    return make_row(
        job="metaopt_grid",
        config="robustness",
        metrics={"error": error, "diverged": float(diverged)},
        seeds=[0],
        steps=1,
        wall_seconds=1.0,
        overrides={"method": method, "initial_rate": rate},
    )


def test_gaps_are_to_the_best_run_of_all():
    rows = [
        grid_row("steady", 1e-3, 0.04),
        grid_row("steady", 1.0, 0.04),
        grid_row("tuned", 1e-3, 0.02),
        grid_row("tuned", 1.0, 0.08),
        grid_row("wild", 1e-3, 0.02),
        grid_row("wild", 1.0, 0.9, diverged=True),
        grid_row("lost", 1e-3, float("nan")),
    ]
    found = gaps(rows, "error")
    assert (found["steady"].worst, found["steady"].mean) == pytest.approx((2, 2))
    assert (found["tuned"].worst, found["tuned"].mean) == pytest.approx((4, 2))
    assert found["tuned"].diverged == 0 and found["wild"].diverged == 0.5
    assert found["lost"].diverged == 1  # a score that is not finite, whatever the parameters are
    assert found["wild"].worst == found["wild"].mean == found["lost"].worst == np.inf
    lines = grid_table(rows).splitlines()
    assert lines[2] == "| steady | 4.00 | 4.00 | 2 | 2 | 0 |"
    assert "| wild | 2.00 | 90.00* | inf | inf | 0.5 |" in lines


def test_many_rates_are_drawn_by_rate(tmp_path):
    """One line for each method, with a gap where a run diverged; no curves are read."""
    rates = tuple(10.0**k for k in range(-7, 2))
    rows = [
        grid_row(method, rate, 0.9 / (i + 1), method == "adam" and i > 6)
        for method in ("adam", "sgd")
        for i, rate in enumerate(rates)
    ]
    figure = by_rate(rows, ("adam", "sgd", "dog"), "error")
    adam, sgd = figure.axes[0].lines
    assert np.isfinite(adam.get_ydata()).sum() == 7 and np.isfinite(sgd.get_ydata()).all()
    assert sgd.get_ydata()[0] == pytest.approx(90)
    path = draw_grid(tmp_path, rows, ("adam", "sgd"), GridSpec(1, 1, rates), "error")
    assert path.stat().st_size > 10_000
