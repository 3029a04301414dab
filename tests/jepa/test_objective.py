"""The objective and the recipe's EMA, against the float64 reference.

Legend: B images, M target blocks, C context slots, T target slots, N grid tokens, D width.
"""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import optax
import pytest

from common.metrics import compute
from common.nn.ops import Policy
from jepa.config import vit
from jepa.encoder import Encoder
from jepa.masks import MaskSpec
from jepa.objective import ObjectiveSpec, feature_norm, ijepa_loss, vicreg_terms
from jepa.predictor import Predictor
from jepa.recipe import EmaSpec, IJepa
from tests.jepa import reference
from tests.jepa.small import (
    CONFIG,
    FLOAT32,
    index_lists,
    padded_batch,
    random_params,
    relative_error,
)

PARAMS = {
    "encoder": random_params(Encoder(CONFIG), 1),
    "predictor": random_params(Predictor(CONFIG), 2),
}
TARGET = random_params(Encoder(CONFIG), 3)
CONTEXTS, TARGETS = index_lists()
BATCH = padded_batch(CONTEXTS, TARGETS)


IJEPA = ObjectiveSpec()


def loss_of(spec=IJEPA, policy=FLOAT32):
    """loss(params, target_params, batch, key) -> (loss, metrics)."""
    encoder = Encoder(CONFIG, policy)
    predictor = Predictor(CONFIG, policy, spec.position_noise)

    def loss(params, target_params, batch, key=None):
        return ijepa_loss(encoder, predictor, spec, params, target_params, batch, key)

    return loss


loss = jax.jit(loss_of())
loss_and_gradient = jax.jit(jax.value_and_grad(loss_of(), argnums=(0, 1), has_aux=True))


@pytest.mark.slow
def test_padding_is_no_part_of_the_targets_spread():
    """Padded slots repeat token 0, or any other: the monitor must not change with it."""
    spreads = [
        compute(loss(PARAMS, TARGET, padded_batch(CONTEXTS, TARGETS, fill))[1])["target_std"]
        for fill in (0, 11)
    ]
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-6)


def test_matches_the_reference():
    want = reference.loss(PARAMS, TARGET, CONFIG, BATCH["image"], CONTEXTS, TARGETS)
    assert relative_error(loss(PARAMS, TARGET, BATCH)[0], want) < 1e-5


def test_both_sides_of_smooth_l1_are_reached():
    """Or the parity above would hold for a squared error too."""
    parts = []
    reference.loss(
        PARAMS, TARGET, CONFIG, BATCH["image"], CONTEXTS, TARGETS, lambda d: parts.append(d) or d
    )
    share = np.mean(np.abs(np.concatenate([part.ravel() for part in parts])) < 1)
    assert 0.1 < share < 0.9


def test_the_second_norm_has_torchs_epsilon():
    """1e-5; the targets' own norm hides it from the loss."""
    x = 1e-3 * np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    want = reference.standardise(x.astype(np.float64), 1e-5)
    assert relative_error(feature_norm(x), want) < 1e-5


def test_squared_error_and_masks_of_one_length():
    contexts = [context[:4] for context in CONTEXTS]
    targets = [[block[:2] for block in blocks] for blocks in TARGETS]
    batch = padded_batch(contexts, targets)
    del batch["context_valid"], batch["target_valid"]
    got = jax.jit(loss_of(ObjectiveSpec(distance="l2")))(PARAMS, TARGET, batch)[0]
    want = reference.loss(PARAMS, TARGET, CONFIG, batch["image"], contexts, targets, np.square)
    assert relative_error(got, want) < 1e-5


@pytest.mark.slow
def test_what_padding_holds_changes_neither_loss_nor_gradient():
    other = padded_batch(CONTEXTS, TARGETS, fill=CONFIG.tokens - 1)
    got = loss_and_gradient(PARAMS, TARGET, BATCH)
    same = loss_and_gradient(PARAMS, TARGET, other)
    assert got[0][0] == same[0][0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), got[1], same[1]
    )


def test_targets_get_no_gradient():
    (value, _), (_, gradient) = loss_and_gradient(PARAMS, TARGET, BATCH)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))
    assert value != loss(PARAMS, PARAMS["encoder"], BATCH)[0]  # though the loss depends on them


@pytest.mark.slow
def test_gradient_matches_finite_differences_of_the_reference():
    """Every leaf along one random direction: central differences in float64 against our float32 gradient."""
    _, (gradient, _) = loss_and_gradient(PARAMS, TARGET, BATCH)
    leaves, tree = jax.tree_util.tree_flatten_with_path(PARAMS)
    slopes = jax.tree.leaves(gradient)
    rng = np.random.default_rng(4)
    for i, (path, leaf) in enumerate(leaves):
        direction = rng.standard_normal(leaf.shape)
        direction /= np.linalg.norm(direction)

        def at(step, i=i, direction=direction):
            moved = [x + step * direction if i == j else x for j, (_, x) in enumerate(leaves)]
            params = jax.tree.unflatten(tree, moved)
            return reference.loss(params, TARGET, CONFIG, BATCH["image"], CONTEXTS, TARGETS)

        want = (at(1e-5) - at(-1e-5)) / 2e-5
        got = (np.asarray(slopes[i], np.float64) * direction).sum()
        scale = np.linalg.norm(slopes[i])
        assert scale > 0 and abs(got - want) < 1e-4 * scale, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_bfloat16_stays_within_its_rounding():
    """The loss averages thousands of errors of about 2^-8 each: a per cent is ample. A gradient has gone through twice
    the contractions of a token and is no average: its rounding adds up, in quadrature, to under a tenth."""
    rounded = loss_of(policy=replace(FLOAT32, compute="bfloat16"))
    (got, _), slopes = jax.jit(jax.value_and_grad(rounded, has_aux=True))(PARAMS, TARGET, BATCH)
    (want, _), (exact, _) = loss_and_gradient(PARAMS, TARGET, BATCH)
    assert 1e-6 < abs(float(got) / float(want) - 1) < 1e-2  # below: not bfloat16 at all
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(slopes), jax.tree.leaves(exact)):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < 0.1, f"{jax.tree_util.keystr(path)} is off by {error:.3f}"


def test_vicreg_terms_match_the_reference():
    rng = np.random.default_rng(0)
    context = (rng.standard_normal((7, 5)) * [0.2, 0.5, 1, 2, 3]).astype(np.float32)
    target = rng.standard_normal((7, 5)).astype(np.float32)
    got, want = vicreg_terms(context, target), reference.vicreg(context, target)
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-5, name


def test_c_jepa_adds_its_terms_on_pooled_embeddings():
    spec = ObjectiveSpec(vicreg=0.1, variance=2.0, covariance=3.0, invariance=5.0)
    got, metrics = jax.jit(loss_of(spec))(PARAMS, TARGET, BATCH)
    images = [reference.normalise(image) for image in BATCH["image"]]
    context, target = (
        np.stack([reference.encode(p, CONFIG, x, k).mean(0) for x, k in zip(images, keep)])
        for p, keep in ((PARAMS["encoder"], CONTEXTS), (TARGET, [None] * len(images)))
    )
    terms = reference.vicreg(context, target)
    plain = reference.loss(PARAMS, TARGET, CONFIG, BATCH["image"], CONTEXTS, TARGETS)
    added = 2 * terms["variance"] + 3 * terms["covariance"] + 5 * terms["invariance"]
    assert relative_error(got, plain + 0.1 * added) < 1e-5
    logged = compute(metrics)
    assert logged["loss"] == pytest.approx(float(got))
    assert logged["loss_prediction"] == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [IJEPA, ObjectiveSpec(position_noise=0.25, vicreg=0.1)])
def test_the_cpus_form_is_the_same_loss(spec):
    """Also where it takes one image at a time, forward and backward: value and gradients stay."""

    def value_and_gradient(policy):
        encoder, predictor = Encoder(CONFIG, policy), Predictor(CONFIG, policy, spec.position_noise)
        loss = partial(ijepa_loss, encoder, predictor, spec)
        got = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jit(got)(PARAMS, TARGET, BATCH, jax.random.key(0))

    cpu = Policy("float32", unroll=1, form="cpu", at_once=1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        value_and_gradient(cpu),
        value_and_gradient(FLOAT32),
    )


@pytest.mark.slow
def test_stop_draws_its_noise_from_the_key():
    noisy = jax.jit(loss_of(ObjectiveSpec(position_noise=0.25)))
    keys = jax.random.key(0), jax.random.key(1)
    values = {float(noisy(PARAMS, TARGET, BATCH, key)[0]) for key in keys}
    assert len(values | {float(loss(PARAMS, TARGET, BATCH)[0])}) == 3


@pytest.mark.parametrize("bad", [{"distance": "l1"}, {"vicreg": -1.0}, {"position_noise": -0.1}])
def test_objectives_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ObjectiveSpec(**bad)


def recipe():
    model = vit("tiny", image=32, patch=4, depth=1, predictor_depth=1, width=12, hidden=8)
    masks = MaskSpec(grid=(8, 8), min_keep=1)
    return IJepa(model, masks, optax.identity(), EmaSpec().schedule(100))


def test_the_target_is_the_exponential_average_of_the_encoder():
    """target <- m target + (1 - m) encoder, with m linear from .996 to 1 over the run (docs/papers/ijepa.md 1.6)."""
    ijepa = recipe()
    encoder = {"kernel": np.array([1.0, 2.0], np.float32)}
    target = np.array([3.0, -1.0])
    for step in range(100):
        m = 0.996 + 0.004 * step / 100
        got = ijepa.update_extra({"target": {"kernel": target}}, {"encoder": encoder}, step)
        target = m * target + (1 - m) * encoder["kernel"]
        np.testing.assert_allclose(got["target"]["kernel"], target, rtol=1e-6)


def test_momentum_at_its_ends():
    assert float(recipe().momentum(0)) == np.float32(0.996)
    assert float(recipe().momentum(100)) == 1.0
    constant = EmaSpec(0.999, 0.999).schedule(100)
    assert float(constant(0)) == float(constant(50)) == np.float32(0.999)


def test_the_target_starts_as_a_copy_of_its_own():
    """Equal, yet in other buffers: the train step donates both."""
    ijepa = recipe()
    params = jax.tree.map(jax.numpy.asarray, PARAMS)
    target = ijepa.init_extra(params)["target"]

    def check(a, b):
        np.testing.assert_array_equal(a, b)
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()

    jax.tree.map(check, params["encoder"], target)
