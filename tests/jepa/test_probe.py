"""What a user relies on in a probe: right numbers, no look at test data, many heads in one pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jepa import probe
from jepa.probe import Features, ProbeSpec

SPEC = ProbeSpec((1e-2, 3e-2), (0.0, 0.1), epochs=5, min_steps=100, batch=128)
HIGHEST_BITS = dict(rtol=1e-4, atol=1e-4)


@functools.cache
def clouds(rows=900, d=12, classes=3, spread=2.5, seed=0):
    """Overlapping Gaussian classes on badly scaled, shifted axes: (train, labels, test, labels)."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    y = rng.integers(0, classes, rows).astype(np.int32)
    x = (centres[y] + rng.normal(size=(rows, d)) * spread / 2) * np.geomspace(0.1, 10, d) + 5
    x = x.astype(np.float32)
    half = rows // 2
    return x[:half], y[:half], x[half:], y[half:]


# Extraction


def encoder(images):
    """A stand-in: 4 tokens of width 3 whose layers are the image's mean times 1..5."""
    mean = jnp.asarray(images, jnp.float32).mean((1, 2, 3))
    tokens = mean[:, None, None] + jnp.arange(4)[None, :, None] + 10 * jnp.arange(3)[None, None]
    layers = [tokens * i for i in range(1, 6)]
    return layers[-1], layers[-4:]


def image_batches(rows=10, batch=4):
    for start in range(0, rows, batch):
        i = np.arange(start, start + batch)
        yield {
            "image": np.tile((i % rows)[:, None, None, None], (1, 8, 8, 3)).astype(np.uint8),
            "label": i % 3,
            "count": i,
            "weight": (i < rows).astype(np.float32),
        }


def test_extract_pools_tokens_keeps_order_and_drops_padding():
    features = probe.extract(encoder, image_batches(), rows=64, labels=("label", "count"))
    pooled = np.arange(10)[:, None] + 1.5 + 10 * np.arange(3)  # tokens average 0..3 to 1.5
    np.testing.assert_allclose(features.last, 5 * pooled, rtol=1e-6)
    np.testing.assert_allclose(
        features.last4, np.concatenate([i * pooled for i in (2, 3, 4, 5)], 1), rtol=1e-6
    )
    np.testing.assert_array_equal(features.labels["count"], np.arange(10))
    np.testing.assert_array_equal(features.labels["label"], np.arange(10) % 3)
    assert features.last.dtype == np.float32 and features.labels["label"].dtype == np.int32


def test_extract_takes_stacked_bfloat16_layers_and_averages_in_float32():
    def stacked(images):
        last, last4 = encoder(images)
        return last.astype(jnp.bfloat16), jnp.stack(last4).astype(jnp.bfloat16)

    exact, rounded = (probe.extract(e, image_batches(), rows=64) for e in (encoder, stacked))
    np.testing.assert_allclose(rounded.last4, exact.last4, rtol=1e-2)
    assert rounded.last.dtype == np.float32


def test_extract_gathers_everything_through_to_host():
    """On many hosts `to_host` gathers the rows of all; here, of two that hold the same."""
    twice = lambda x: np.concatenate([np.asarray(x)] * 2)  # noqa: E731
    one = probe.extract(encoder, image_batches(4, 4), rows=64)
    two = probe.extract(encoder, image_batches(4, 4), rows=64, to_host=twice)
    np.testing.assert_array_equal(two.last, twice(one.last))
    np.testing.assert_array_equal(two.labels["label"], twice(one.labels["label"]))


def test_extract_without_batches_says_so():
    with pytest.raises(ValueError, match="no batches"):
        probe.extract(encoder, [], rows=64)


# Standardisation


def test_standardize_uses_training_statistics_and_silences_dead_features():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(200, 3)).astype(np.float32) * [1, 5, 0] + [0, -3, 0.1]
    test = rng.normal(size=(50, 3)) * 7
    train_out, test_out = probe.standardize(train, test)
    scaler = StandardScaler().fit(train[:, :2])
    np.testing.assert_allclose(train_out[:, :2], scaler.transform(train[:, :2]), **HIGHEST_BITS)
    np.testing.assert_allclose(test_out[:, :2], scaler.transform(test[:, :2]), **HIGHEST_BITS)
    assert not np.any(train_out[:, 2]) and not np.any(test_out[:, 2])


# Linear probe


@pytest.mark.parametrize("rotate", [False, True])
def test_linear_probe_reaches_the_logistic_regression_optimum(rotate):
    train, y, test, test_y = clouds()
    spec = dataclasses.replace(SPEC, min_steps=400, rotate=rotate)
    ours = probe.linear_probe(train, y, test, test_y, 3, spec).accuracy
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=1e3, max_iter=500))
    theirs = reference.fit(train, y).score(test, test_y)
    assert 0.5 < theirs < 0.95, "the data must be neither trivial nor hopeless"
    assert ours == pytest.approx(theirs, abs=0.02)


def test_trained_logits_equal_scikit_learns():
    train, y, *_ = clouds()
    (x,) = probe.standardize(train)
    spec = ProbeSpec(min_steps=1500, batch=10_000)
    head = probe._fit(x, jnp.asarray(y), np.arange(len(y)), [(3e-2, 0.0)], 3, spec, None, "")
    theirs = LogisticRegression(C=1e5, max_iter=1000, tol=1e-7).fit(x, y)
    ours = jax.nn.log_softmax(x @ head["w"][0] + head["b"][0][None])
    np.testing.assert_allclose(ours, theirs.predict_log_proba(x), atol=0.02)


def test_many_heads_at_once_equal_heads_one_by_one():
    train, y, *_ = clouds()
    (x,) = probe.standardize(train)
    grid = [(1e-3, 0.0), (1e-2, 1.0), (3e-2, 0.1)]
    args = jnp.asarray(y), np.arange(400)
    for optimizer in probe.OPTIMIZERS:
        spec = dataclasses.replace(SPEC, optimizer=optimizer)
        together = probe._fit(x, *args, grid, 3, spec, None, "")
        for h, pair in enumerate(grid):
            alone = probe._fit(x, *args, [pair], 3, spec, None, "")
            np.testing.assert_allclose(together["w"][h], alone["w"][0], **HIGHEST_BITS)
            np.testing.assert_allclose(together["b"][h], alone["b"][0], **HIGHEST_BITS)
        assert np.abs(together["w"][0] - together["w"][1]).max() > 1e-3


def test_heads_share_one_matmul():
    """A product batched over heads would read the features once per head."""
    heads_and_state = probe._zero_heads("adamw", 6, 12, 3)
    data = jnp.zeros((64, 12)), jnp.zeros(64, int), jnp.zeros((4, 16), int), jnp.ones(4)
    lowered = probe._train.lower(
        *heads_and_state, *data, jnp.ones(6), jnp.ones(6), optimizer="adamw"
    ).as_text()
    products = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 2, "one forward, one for the gradient"
    assert not any("batching_dims" in line for line in products)


def test_weight_decay_spares_the_bias():
    x, y = jnp.ones((64, 2)), jnp.asarray([0] * 48 + [1] * 16)
    spec = dataclasses.replace(SPEC, batch=64, min_steps=500)
    head = probe._fit(x * 0, y, np.arange(64), [(3e-2, 10.0)], 2, spec, None, "")
    np.testing.assert_allclose(jax.nn.softmax(head["b"][0]), [0.75, 0.25], atol=0.01)


def test_test_labels_and_features_do_not_reach_the_choice():
    train, y, test, test_y = clouds()
    honest = probe.linear_probe(train, y, test, test_y, 3, SPEC)
    other = probe.linear_probe(train, y, -3 * test + 1, np.roll(test_y, 1), 3, SPEC)
    assert honest.accuracy > other.accuracy
    assert (honest.learning_rate, honest.weight_decay) == (other.learning_rate, other.weight_decay)
    np.testing.assert_array_equal(honest.grid, other.grid)


def test_a_test_row_is_judged_alone():
    """Standardising with test statistics, as StoP's script does, would let rows interact."""
    train, y, test, test_y = clouds()
    outliers = np.full_like(test, 1e4)
    alone = probe.linear_probe(train, y, test, test_y, 3, SPEC).accuracy
    never = np.full_like(test_y, -1)  # outliers are always wrong
    crowd = np.concatenate([test, outliers]), np.concatenate([test_y, never])
    assert probe.linear_probe(train, y, *crowd, 3, SPEC).accuracy == pytest.approx(alone / 2)


def test_the_reported_pair_is_the_best_of_the_held_out_grid():
    train, y, test, test_y = clouds()
    spec = dataclasses.replace(SPEC, learning_rates=(1e-9, 1e-2, 1e3), weight_decays=(10.0, 0.0))
    result = probe.linear_probe(train, y, test, test_y, 3, spec)
    assert result.grid.shape == (3, 2)
    assert result.held_out_accuracy == result.grid.max()
    i = spec.learning_rates.index(result.learning_rate)
    assert result.grid[i, spec.weight_decays.index(result.weight_decay)] == result.grid.max()
    assert result.learning_rate == 1e-2
    chosen = dataclasses.replace(spec, learning_rates=(1e-2,), weight_decays=(result.weight_decay,))
    assert result.accuracy == probe.linear_probe(train, y, test, test_y, 3, chosen).accuracy


def test_held_out_rows_are_not_trained_on():
    """Random labels that a head can memorise: on rows it has not seen it stays at chance."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 250)).astype(np.float32), rng.integers(0, 2, 200)
    spec = dataclasses.replace(SPEC, min_steps=200)
    result = probe.linear_probe(x, y, x, y, 2, spec)
    assert result.accuracy > 0.95, "it can memorise"
    assert result.held_out_accuracy < 0.75


def test_shift_and_scale_of_features_do_not_matter():
    train, y, test, test_y = clouds()
    moved = [x * np.geomspace(1e-2, 1e2, 12, dtype=np.float32) - 1 for x in (train, test)]
    same = probe.linear_probe(train, y, test, test_y, 3, SPEC)
    other = probe.linear_probe(moved[0], y, moved[1], test_y, 3, SPEC)
    assert other.accuracy == pytest.approx(same.accuracy, abs=0.01)
    raw = dataclasses.replace(SPEC, standardize=False, rotate=False)
    assert probe.linear_probe(moved[0], y, moved[1], test_y, 3, raw).accuracy < same.accuracy


def test_lars_learns_too():
    train, y, test, test_y = clouds(spread=0.5)
    spec = dataclasses.replace(SPEC, optimizer="lars", learning_rates=(1.0, 10.0), min_steps=300)
    assert probe.linear_probe(train, y, test, test_y, 3, spec).accuracy > 0.95


def test_probe_repeats_exactly_and_reports_progress_to_the_end():
    calls = []
    args = *clouds(), 3, SPEC
    first = probe.linear_probe(*args, progress=lambda *call: calls.append(call))
    again = probe.linear_probe(*args)
    assert (first.accuracy, first.held_out_accuracy) == (again.accuracy, again.held_out_accuracy)
    for what in ("probe grid", "probe"):
        done = [(i, total) for name, i, total in calls if name == what]
        assert done == [(i + 1, len(done)) for i in range(len(done))]


def test_probe_all_takes_the_better_of_both_layers_for_each_label_set():
    rng = np.random.default_rng(0)
    shape, count = rng.integers(0, 2, (2, 600)).astype(np.int32)
    noise = rng.normal(size=(600, 4))
    last = (shape[:, None] + 0.1 * noise).astype(np.float32)  # knows the shape alone
    last4 = (count[:, None] + 0.1 * noise).astype(np.float32)  # and this the count
    train, test = (
        Features(last[s], last4[s], {"shape": shape[s], "count": count[s]})
        for s in (slice(0, 400), slice(400, None))
    )
    results = probe.probe_all(train, test, SPEC)
    assert set(results) == {f"{k}{v}" for k in ("shape", "count") for v in ("", "/last", "/last4")}
    assert results["shape"] is results["shape/last"] and results["shape"].accuracy > 0.99
    assert results["count"] is results["count/last4"] and results["count"].accuracy > 0.99
    assert results["shape/last4"].accuracy < 0.7


def test_equal_features_of_both_layers_are_probed_once(monkeypatch):
    labels = np.random.default_rng(0).integers(0, 2, 200).astype(np.int32)
    x = (labels[:, None] + np.zeros((200, 2))).astype(np.float32)
    halves = [Features(x[s], x[s].copy(), {"label": labels[s]}) for s in np.s_[:100, 100:]]
    calls = []
    once = probe.linear_probe
    monkeypatch.setattr(probe, "linear_probe", lambda *a: calls.append(a) or once(*a))
    results = probe.probe_all(*halves, SPEC)
    assert len(calls) == 1
    assert results["label"] is results["label/last"] is results["label/last4"]


# Few labels


def test_few_labels_takes_the_same_number_of_each_class():
    labels = np.random.default_rng(0).integers(0, 5, 300)
    rows = probe.few_labels(labels, 7, seed=1)
    assert np.bincount(labels[rows]).tolist() == [7] * 5 and len(set(rows)) == 35
    np.testing.assert_array_equal(rows, probe.few_labels(labels, 7, seed=1))
    assert set(rows) != set(probe.few_labels(labels, 7, seed=2))
    with pytest.raises(ValueError, match="per_class=200"):
        probe.few_labels(labels, 200)


@pytest.mark.parametrize("l2", [0.0025, 10.0, 300.0])
def test_logistic_probe_minimises_the_stated_objective(l2):
    """Against Newton's method on the same objective."""
    train, y, test, test_y = clouds()
    model = LogisticRegression(C=1 / l2, fit_intercept=False, solver="newton-cg", tol=1e-8)
    pipeline = make_pipeline(StandardScaler(), model).fit(train.astype(float), y)
    expected = pipeline.score(test, test_y)
    assert probe.logistic_probe(train, y, test, test_y, l2=l2) == pytest.approx(expected, abs=0.005)


@pytest.mark.filterwarnings("error")
def test_logistic_probe_stops_quietly_at_its_iteration_limit():
    args = clouds()
    assert probe.logistic_probe(*args, max_iter=1) != probe.logistic_probe(*args, max_iter=50)


# Nearest neighbours


def brute_force_knn(train, y, test, classes, k, temperature):
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    cosine = unit(test.astype(np.float64)) @ unit(train.astype(np.float64)).T
    predicted = []
    for row in cosine:
        votes = np.zeros(classes)
        for i in np.argsort(-row)[:k]:
            votes[y[i]] += np.exp(row[i] / temperature)
        predicted.append(votes.argmax())
    return np.array(predicted)


@pytest.mark.parametrize(
    "k, temperature", [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (450, 0.2)]
)
def test_knn_equals_brute_force(k, temperature):
    train, y, test, test_y = clouds()
    expected = (brute_force_knn(train - 5, y, test - 5, 3, k, temperature) == test_y).mean()
    assert probe.knn(train - 5, y, test - 5, test_y, 3, k, temperature) == pytest.approx(expected)


def test_one_neighbour_equals_scikit_learns():
    train, y, test, test_y = clouds()
    theirs = KNeighborsClassifier(1, metric="cosine").fit(train - 5, y).score(test - 5, test_y)
    assert probe.knn(train - 5, y, test - 5, test_y, 3, k=1) == pytest.approx(theirs)


def test_knn_ignores_lengths_and_survives_a_tiny_temperature():
    train, y, test, test_y = clouds()
    lengths = np.random.default_rng(0).uniform(0.1, 10, (len(train), 1)).astype(np.float32)
    plain = probe.knn(train - 5, y, test - 5, test_y, 3)
    assert probe.knn((train - 5) * lengths, y, 100 * (test - 5), test_y, 3) == plain
    sharp = probe.knn(train - 5, y, test - 5, test_y, 3, k=20, temperature=1e-4)
    assert sharp == pytest.approx(probe.knn(train - 5, y, test - 5, test_y, 3, k=1), abs=0.005)


def test_knn_chunks_do_not_change_the_votes():
    train, y, test, _ = map(jnp.asarray, clouds())
    votes = [probe._knn_votes(train, y, test, 3, 20, 0.07, chunk) for chunk in (1, 7, 1000)]
    np.testing.assert_array_equal(votes[0], votes[2])
    np.testing.assert_array_equal(votes[1], votes[2])


# Errors name the value seen


def test_wrong_arguments_are_named():
    train, y, test, test_y = clouds()
    with pytest.raises(ValueError, match=r"span \[0, 2\], outside 0..1"):
        probe.linear_probe(train, y, test, test_y, 2, SPEC)
    with pytest.raises(ValueError, match=r"test: \(450, 12\) features but labels of shape \(9,\)"):
        probe.linear_probe(train, y, test, test_y[:9], 3, SPEC)
    with pytest.raises(ValueError, match=r"k=451 must lie in 1..450"):
        probe.knn(train, y, test, test_y, 3, k=451)
    with pytest.raises(ValueError, match="two training rows"):
        probe.linear_probe(train[:1], y[:1], test, test_y, 3, SPEC)
    with pytest.raises(ValueError, match="at least one learning rate"):
        ProbeSpec(learning_rates=())
    with pytest.raises(ValueError, match="optimizer='sgd': choose from adamw, lars"):
        ProbeSpec(optimizer="sgd")
    with pytest.raises(ValueError, match="epochs=0"):
        ProbeSpec(epochs=0)
