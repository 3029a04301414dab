"""Frozen-feature probes: linear, logistic and kNN (Assran et al. 2023, appendix A.2; docs/papers/ijepa.md 2).

Features are extracted once, without augmentation, and every probe reads the same arrays (`jepa.features`).
All probes standardise with the statistics of the training features only; none chooses anything on test data.

Legend: I images, D features, C classes, H heads, S steps, B rows of a batch, K neighbours.
"""

import functools
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from jepa.features import Features, Progress, extract, labelled, probable_labels
from jepa.host_rows import HostRows, host_rows

__all__ = [
    "Features",
    "ProbeResult",
    "ProbeSpec",
    "extract",
    "few_labels",
    "knn",
    "labelled",
    "linear_probe",
    "logistic_probe",
    "probable_labels",
    "probe_all",
    "standardize",
]

Rows = jax.Array | np.ndarray  # features [I, D] or labels [I], on the device or the host
_HEAD_BYTES = 4 * 2**30  # of heads that are trained at once, with gradients and both moments
_DECAYED = {"w": True, "b": False}
_HELD_OUT = 0.1  # of the training rows, to choose the learning rate and weight decay
_dot = functools.partial(jnp.dot, precision="highest")  # TPU and GPU round float32 otherwise

OPTIMIZERS = {
    "adamw": lambda lr, wd: optax.adamw(lr, weight_decay=wd, mask=_DECAYED),
    "lars": lambda lr, wd: optax.lars(lr, wd, _DECAYED, trust_ratio_mask=_DECAYED),
}


@dataclass(frozen=True)
class ProbeSpec:
    """How linear heads are trained: every learning rate with every weight decay, at once.

    Attributes:
      learning_rates, weight_decays: the grid; each rate falls to zero along a cosine.
      epochs, min_steps: passes over the data, more if those are fewer than `min_steps` updates.
      batch: rows of one update; fewer rows than that are one full batch.
      seed: of the held-out slice and of the order of the rows.
      optimizer: a key of `OPTIMIZERS`: "adamw", or "lars" as in the paper (for batches near 16384).
      standardize: subtract the mean and divide by the deviation of the training features.
      rotate: express features in their principal axes. The heads are as linear as before, but
        AdamW's per-coordinate steps then follow the curvature: on CIFAR-10's 50,000 images, 20
        epochs come nearer to the optimum than 100 without. Turn it off where features outnumber
        images: there the slow axes are noise, and `logistic_probe` is the better tool anyway.
      device_bytes: features of more bytes than this stay on the host, and their rows come to the
        device as they are needed. The numbers are the same but for rounding.
    """

    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    weight_decays: tuple[float, ...] = (0.0, 0.1, 1.0)
    epochs: int = 20
    min_steps: int = 500
    batch: int = 1024
    seed: int = 0
    optimizer: str = "adamw"
    standardize: bool = True
    rotate: bool = True
    device_bytes: int = 2 * 2**30

    def __post_init__(self):
        if not self.learning_rates or not self.weight_decays:
            raise ValueError("ProbeSpec needs at least one learning rate and one weight decay")
        if min(self.epochs, self.batch) < 1:
            raise ValueError(f"epochs={self.epochs} and batch={self.batch} must be at least 1")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r}: choose from {', '.join(OPTIMIZERS)}")


@dataclass(frozen=True)
class ProbeResult:
    """Test accuracy of the head that did best on the held-out rows, retrained on all training rows.

    Attributes:
      accuracy: in [0, 1], on the test set.
      learning_rate, weight_decay: chosen on the held-out rows.
      held_out_accuracy: of that choice, before retraining.
      grid: held-out accuracies f32[learning rates, weight decays].
    """

    accuracy: float
    learning_rate: float
    weight_decay: float
    held_out_accuracy: float
    grid: np.ndarray


@jax.jit
def standardize(train_ID: Rows, *others_ID: Rows) -> tuple[jax.Array, ...]:
    """Centres and scales by the moments of `train_ID`, in float32; dead features become 0."""
    all_ID = [jnp.asarray(x, jnp.float32) for x in (train_ID, *others_ID)]
    mean_1D, std_1D = (f(all_ID[0], axis=0, keepdims=True) for f in (jnp.mean, jnp.std))
    alive_1D = std_1D > 1e-6 * jnp.abs(mean_1D)  # rounding makes constants deviate too
    scale_1D = jnp.where(alive_1D, 1 / jnp.where(alive_1D, std_1D, 1), 0)
    return tuple((x_ID - mean_1D) * scale_1D for x_ID in all_ID)


@jax.jit
def _rotate(train_ID: jax.Array, test_ID: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in the principal axes of `train_ID`."""
    _, axes_DD = jnp.linalg.eigh(_dot(train_ID.T, train_ID) / len(train_ID))
    return _dot(train_ID, axes_DD), _dot(test_ID, axes_DD)


def _check(train, train_labels, test, test_labels, num_classes):
    for name, x, y in (("train", train, train_labels), ("test", test, test_labels)):
        if np.shape(y) != np.shape(x)[:1]:
            raise ValueError(f"{name}: {np.shape(x)} features but labels of shape {np.shape(y)}")
    if np.min(train_labels) < 0 or np.max(train_labels) >= num_classes:
        raise ValueError(
            f"training labels span [{np.min(train_labels)}, {np.max(train_labels)}], "
            f"outside 0..{num_classes - 1}: pass a larger num_classes or renumber them"
        )


def _logits(head: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    y = _dot(x, head["w"])
    return y + jax.lax.broadcast_to_rank(head["b"], y.ndim)


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnames=("heads", "opt_state"))
def _train(heads, opt_state, x_ID, y_I, rows_SB, fraction_S, lr_H, wd_H, *, optimizer: str):
    """One step of all heads for each of `rows_SB`; vmap makes their products with it one matmul."""

    def head_step(head, opt_state, lr, wd, x_BD, y_B):
        def loss(head):
            logits_BC = _logits(head, x_BD)
            return optax.softmax_cross_entropy_with_integer_labels(logits_BC, y_B).mean()

        tx = OPTIMIZERS[optimizer](lr, wd)
        updates, opt_state = tx.update(jax.grad(loss)(head), opt_state, head)
        return optax.apply_updates(head, updates), opt_state

    def step(carry, slice_of_epoch):
        (heads, opt_state), (rows_B, fraction) = carry, slice_of_epoch
        all_heads = jax.vmap(head_step, in_axes=(0, 0, 0, 0, None, None))
        batch = x_ID[rows_B], y_I[rows_B]
        return all_heads(heads, opt_state, fraction * lr_H, wd_H, *batch), None

    return jax.lax.scan(step, (heads, opt_state), (rows_SB, fraction_S))[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _zero_heads(optimizer: str, H: int, D: int, C: int):
    heads = {"w": jnp.zeros((H, D, C)), "b": jnp.zeros((H, C))}
    return heads, jax.vmap(OPTIMIZERS[optimizer](0.0, 0.0).init)(heads)


def _on_device(x_ID, y_I, rows_SB) -> Iterator[tuple[slice, Any, Any, np.ndarray]]:
    """Parts of the S steps, in order: (which, features and labels on the device, rows of these)."""
    if not isinstance(x_ID, HostRows):
        yield slice(None), x_ID, y_I, rows_SB
        return
    S, B = rows_SB.shape
    steps = max(1, x_ID.chunk // B)
    for start in range(0, S, steps):
        part = rows_SB[start : start + steps]
        rows = part.ravel()
        local_SB = np.arange(rows.size).reshape(part.shape)
        yield slice(start, start + steps), x_ID.take(rows), y_I[rows], local_SB


def _fit(x_ID, y_I, rows, grid, num_classes, spec: ProbeSpec, progress: Progress | None, what: str):
    """One head per (learning rate, weight decay) of `grid`: {"w": f32[H, D, C], "b": f32[H, C]}."""
    batch = min(spec.batch, len(rows))
    steps = len(rows) // batch
    epochs = max(spec.epochs, -(-spec.min_steps // steps))
    rng = np.random.default_rng(spec.seed)
    cosine = 0.5 + 0.5 * np.cos(np.pi * np.linspace(0, 1, epochs * steps, endpoint=False))
    lr_H, wd_H = np.array(grid, np.float32).T
    carry = _zero_heads(spec.optimizer, len(grid), x_ID.shape[1], num_classes)
    for epoch, fraction_S in enumerate(np.split(cosine.astype(np.float32), epochs), start=1):
        rows_SB = rng.permutation(rows)[: steps * batch].reshape(steps, batch)
        for part, *where in _on_device(x_ID, y_I, rows_SB):
            args = *where, fraction_S[part], lr_H, wd_H
            carry = _train(*carry, *args, optimizer=spec.optimizer)
            if isinstance(x_ID, HostRows):
                jax.block_until_ready(carry)  # dispatch runs ahead, and chunks would pile up
        if progress:
            jax.block_until_ready(carry)  # dispatch runs ahead
            progress(what, epoch, epochs)
    return carry[0]


def _accuracy(heads, x_ID, y_I, rows) -> np.ndarray:
    """The accuracy of every head on `rows`, [H]."""
    size = x_ID.chunk if isinstance(x_ID, HostRows) else len(rows)
    correct_H = 0
    for start in range(0, len(rows), size):
        for _, *where in _on_device(x_ID, y_I, rows[None, start : start + size]):
            correct_H += np.asarray(_correct(heads, *where))
    return np.asarray(correct_H / len(rows), np.float32)


@jax.jit
def _correct(heads, x_ID, y_I, rows_SB) -> jax.Array:
    """How many rows every head gets right, [H]; in slices, as the [rows, H, C] logits may not fit."""

    def correct(row):
        predict = jax.vmap(lambda head: jnp.argmax(_logits(head, x_ID[row])))
        return predict(heads) == y_I[row]

    return jax.lax.map(correct, rows_SB.ravel(), batch_size=4096).sum(0)


def _on_axes(train, test, spec: ProbeSpec):
    """Both standardised and rotated as `spec` says: on the device, or, if too large, on the host."""
    if max(np.size(train), np.size(test)) * 4 > spec.device_bytes:
        chunk_bytes = max(1, spec.device_bytes // 4)
        rows = host_rows(np.asarray(train), spec.standardize, spec.rotate, chunk_bytes)
        return rows, rows.like(np.asarray(test))
    train_ID, test_ID = standardize(train, test) if spec.standardize else (train, test)
    if spec.rotate:
        train_ID, test_ID = _rotate(train_ID, test_ID)
    return jnp.asarray(train_ID, jnp.float32), jnp.asarray(test_ID, jnp.float32)


def linear_probe(
    train: Rows,
    train_labels: Rows,
    test: Rows,
    test_labels: Rows,
    num_classes: int,
    spec: ProbeSpec = ProbeSpec(),
    progress: Progress | None = None,
) -> ProbeResult:
    """Linear softmax classifier on frozen features (docs/papers/ijepa.md 2).

    Trains the whole grid of `spec` at once on 90 % of the training rows, picks the pair that is
    most accurate on the other 10 % (ties go to the first), retrains that one on all of them and
    reports its test accuracy.

    Args:
      train, test: features f32[I, D].
      train_labels, test_labels: i32[I] in 0..num_classes-1.
    """
    _check(train, train_labels, test, test_labels, num_classes)
    if len(train_labels) < 2:
        raise ValueError("linear_probe needs two training rows or more, one to be held out")
    train_ID, test_ID = _on_axes(train, test, spec)
    y_I, test_y_I = jnp.asarray(train_labels, jnp.int32), jnp.asarray(test_labels, jnp.int32)
    order = np.random.default_rng(spec.seed).permutation(len(y_I))
    held_out, rest = np.split(order, [max(1, int(_HELD_OUT * len(order)))])

    grid = list(itertools.product(spec.learning_rates, spec.weight_decays))
    at_once = max(1, _HEAD_BYTES // (16 * train_ID.shape[1] * num_classes))
    accuracies = []
    for i in range(0, len(grid), at_once):
        part = grid[i : i + at_once]
        heads = _fit(train_ID, y_I, rest, part, num_classes, spec, progress, "probe grid")
        accuracies.append(_accuracy(heads, train_ID, y_I, held_out))
    held_out_H = np.concatenate(accuracies)
    best = int(held_out_H.argmax())
    head = _fit(train_ID, y_I, order, grid[best : best + 1], num_classes, spec, progress, "probe")
    return ProbeResult(
        accuracy=float(_accuracy(head, test_ID, test_y_I, np.arange(len(test_y_I)))[0]),
        learning_rate=grid[best][0],
        weight_decay=grid[best][1],
        held_out_accuracy=float(held_out_H[best]),
        grid=held_out_H.reshape(len(spec.learning_rates), len(spec.weight_decays)),
    )


def probe_all(
    train: Features, test: Features, spec: ProbeSpec = ProbeSpec(), progress: Progress | None = None
) -> dict[str, ProbeResult]:
    """Linear probes of every label set on the last layer and on the last four concatenated.

    Returns "<label>/last", "<label>/last4", and "<label>": the one of both with the higher
    held-out accuracy, as the paper reports the better one. Classes are 0..largest training label.
    Images without a label (-1) are left out, and so are sets that `probable_labels` refuses.
    Where both are the same features (raw pixels, an encoder of one layer), they are probed once.
    """
    results = {}
    same = np.array_equal(train.last, train.last4)
    for name in probable_labels(train, test)[0]:
        (of_train, labels), (of_test, test_labels) = labelled(train, name), labelled(test, name)
        for layers in ("last", "last4"):
            if same and layers == "last4":
                results[f"{name}/last4"] = results[f"{name}/last"]
                continue
            results[f"{name}/{layers}"] = linear_probe(
                getattr(of_train, layers),
                labels,
                getattr(of_test, layers),
                test_labels,
                int(labels.max()) + 1,
                spec,
                progress,
            )
        pair = results[f"{name}/last"], results[f"{name}/last4"]
        results[name] = max(pair, key=lambda result: result.held_out_accuracy)
    return results


def few_labels(labels: Rows, per_class: int, seed: int = 0) -> np.ndarray:
    """Sorted rows of a random subset with `per_class` images of each class, for low-shot probes."""
    labels = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    rows = [order[labels[order] == c][:per_class] for c in np.unique(labels)]
    if min(map(len, rows)) < per_class:
        raise ValueError(
            f"per_class={per_class}, but a class has only {min(map(len, rows))} images"
        )
    return np.sort(np.concatenate(rows))


def logistic_probe(
    train: Rows,
    train_labels: Rows,
    test: Rows,
    test_labels: Rows,
    *,
    l2: float = 0.0025,
    max_iter: int = 100,
) -> float:
    """Test accuracy of multinomial logistic regression: cheap, deterministic, for few labels.

    Minimises (sum of cross-entropies) + l2 / 2 |W|^2 on standardised features, without intercept,
    in at most `max_iter` L-BFGS iterations (docs/papers/ijepa.md 2, "1% labels, linear"; a rotation, as
    there, would leave this objective unchanged).
    """
    train_ID, test_ID = map(np.asarray, standardize(train, test))
    model = LogisticRegression(C=1 / l2, fit_intercept=False, max_iter=max_iter)
    with warnings.catch_warnings():  # the protocol stops after max_iter, converged or not
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train_ID, np.asarray(train_labels))
    return float(model.score(test_ID, np.asarray(test_labels)))


@functools.partial(jax.jit, static_argnames=("num_classes", "k", "chunk"))
def _knn_votes(train_ID, labels_I, test_ID, num_classes, k, temperature, chunk):
    def unit(x_ID):
        return x_ID / jnp.maximum(jnp.linalg.norm(x_ID, axis=-1, keepdims=True), 1e-12)

    train_ID = unit(train_ID)

    def predict(x_D):
        cosine_K, rows_K = jax.lax.top_k(_dot(x_D, train_ID.T), k)
        weight_K = jax.nn.softmax(cosine_K / temperature)  # scaled, so that none overflows
        return jnp.zeros(num_classes).at[labels_I[rows_K]].add(weight_K).argmax()

    return jax.lax.map(predict, unit(test_ID), batch_size=chunk)


def knn(
    train: Rows,
    train_labels: Rows,
    test: Rows,
    test_labels: Rows,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Test accuracy of a cosine k-nearest-neighbour vote weighted by exp(cosine / temperature).

    As in Wu et al. 2018 (arXiv 1805.01978, section 3.4) and DINO. Features are scaled to unit
    length only. A tie goes to the lower class. About 2^24 similarities are held at a time.

    Args:
      train, test: features f32[I, D].
      train_labels, test_labels: i32[I] in 0..num_classes-1.
    """
    _check(train, train_labels, test, test_labels, num_classes)
    if not 1 <= k <= len(train_labels):
        raise ValueError(f"k={k} must lie in 1..{len(train_labels)}, the number of training rows")
    predicted_I = _knn_votes(
        jnp.asarray(train, jnp.float32),
        jnp.asarray(train_labels, jnp.int32),
        jnp.asarray(test, jnp.float32),
        num_classes,
        k,
        temperature,
        chunk=max(1, 2**24 // len(train_labels)),
    )
    return float(np.mean(np.asarray(predicted_I) == np.asarray(test_labels)))
