"""The encoder is the paper's ViT: held to a float64 NumPy version written from the specification."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from common.nn.layers import LayerNorm
from common.nn.module import define
from common.nn.ops import Policy
from jepa.config import vit
from jepa.encoder import Encoder
from jepa.predictor import Predictor
from tests.jepa import reference
from tests.jepa.small import CONFIG, FLOAT32, index_lists, pad, random_params, relative_error

ENCODER = Encoder(CONFIG, FLOAT32)
PARAMS = random_params(ENCODER, 1)
IMAGES = np.random.default_rng(2).standard_normal((3, *CONFIG.image, 3)).astype(np.float32)
CONTEXTS, _ = index_lists()

encode = jax.jit(ENCODER.__call__)


def test_matches_the_reference():
    want = np.stack([reference.encode(PARAMS, CONFIG, image) for image in IMAGES])
    assert relative_error(encode(PARAMS, IMAGES), want) < 1e-5


def test_matches_the_reference_on_kept_tokens():
    keep = np.stack([context[:4] for context in CONTEXTS])
    want = np.stack([reference.encode(PARAMS, CONFIG, x, k) for x, k in zip(IMAGES, keep)])
    assert relative_error(encode(PARAMS, IMAGES, keep), want) < 1e-5


def test_matches_the_reference_on_padded_contexts():
    keep, valid = pad(CONTEXTS)
    got = np.asarray(encode(PARAMS, IMAGES, keep, valid.sum(-1)))
    for z, image, context in zip(got, IMAGES, CONTEXTS):
        want = reference.encode(PARAMS, CONFIG, image, context)
        assert relative_error(z[: len(context)], want) < 1e-5


def test_what_padding_holds_changes_nothing():
    keep, valid = pad(CONTEXTS)
    other, _ = pad(CONTEXTS, fill=CONFIG.tokens - 1)
    assert (keep != other).any()
    got, same = (np.asarray(encode(PARAMS, IMAGES, k, valid.sum(-1))) for k in (keep, other))
    np.testing.assert_array_equal(got[valid], same[valid])


def test_dropped_pixels_are_never_seen():
    keep, valid = pad(CONTEXTS)

    def pull(images):
        return (ENCODER(PARAMS, images, keep, valid.sum(-1)) ** 3 * valid[..., None]).sum()

    gradient = np.asarray(jax.jit(jax.grad(pull))(IMAGES))
    for image, context in zip(gradient, CONTEXTS):
        seen = np.abs(reference.patches(image, CONFIG.patch)).max(1) > 0
        np.testing.assert_array_equal(np.flatnonzero(seen), context)


def test_bfloat16_stays_within_its_rounding():
    """An operand is rounded by at most 2^-9 of itself. A token passes 1 + 6 * depth contractions, whose
    errors are independent and so add in quadrature; twice that leaves room for what softmax and
    norms magnify."""
    want = np.asarray(encode(PARAMS, IMAGES))
    got = np.asarray(jax.jit(Encoder(CONFIG, replace(FLOAT32, compute="bfloat16")))(PARAMS, IMAGES))
    error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert 1e-4 < error < 2 * 2**-9 * np.sqrt(1 + 6 * CONFIG.depth)  # below: not bfloat16 at all


@pytest.mark.slow
def test_every_loop_layout_is_the_same_function():
    config = replace(CONFIG, depth=2)
    params = PARAMS | {"blocks": jax.tree.map(lambda p: p[:2], PARAMS["blocks"])}

    def value_and_grad(**layout):
        def pull(params):
            return (Encoder(config, replace(FLOAT32, **layout))(params, IMAGES) ** 3).sum()

        return jax.tree.leaves(jax.jit(jax.value_and_grad(pull))(params))

    unrolled = value_and_grad(unroll=2)
    for layout in ({"unroll": 1}, {"unroll": 1, "remat": True}):
        for got, want in zip(value_and_grad(**layout), unrolled, strict=True):
            assert relative_error(got, want) < 1e-5


def test_layers_are_the_outputs_of_shallower_encoders():
    got = np.asarray(jax.jit(lambda p, x: ENCODER.layers(p, x, last=2))(PARAMS, IMAGES))
    for depth, output in zip((2, 3), got, strict=True):
        shallow = PARAMS | {"blocks": jax.tree.map(lambda p, d=depth: p[:d], PARAMS["blocks"])}
        want = np.stack([reference.encode(shallow, CONFIG, image) for image in IMAGES])
        assert relative_error(output, want) < 1e-5
    with pytest.raises(ValueError, match="last 4 of 3 layers"):
        ENCODER.layers(PARAMS, IMAGES, last=4)


def test_norms_have_the_released_epsilon():
    """1e-6. Tokens are never small enough to show it: positions alone have variance 1/2."""
    norm = define(lambda rngs: LayerNorm(8, FLOAT32, rngs))
    params = random_params(norm, 1)
    x = 1e-3 * np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    assert relative_error(norm(params, x), reference.layer_norm(params, x.astype(float))) < 1e-5


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(16, 24, 3\), got \(24, 16, 3\)"):
        ENCODER(PARAMS, IMAGES.swapaxes(1, 2))


@pytest.mark.slow
def test_init_statistics():
    """Every kernel N(0, .02^2), biases 0, scales 1, no two layers alike (docs/papers/ijepa.md 1.5)."""
    config = vit("tiny", image=32, patch=4, depth=2, predictor_depth=2)
    for module in (Encoder(config), Predictor(config)):
        params = jax.jit(module.init)(jax.random.key(0))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name, leaf = jax.tree_util.keystr(path), np.asarray(leaf)
            if path[-1].key == "kernel":
                error = 4 / np.sqrt(2 * leaf.size)  # four standard errors of a deviation
                assert abs(leaf.std() / 0.02 - 1) < error, f"{name} has deviation {leaf.std()}"
                assert abs(leaf.mean()) < 4 * 0.02 / np.sqrt(leaf.size), name
                if path[0].key == "blocks":
                    assert abs(np.corrcoef(leaf[0].ravel(), leaf[1].ravel())[0, 1]) < 0.05, name
            elif path[-1].key != "mask_token":
                assert (leaf == (path[-1].key == "scale")).all(), name


def test_mask_token_is_drawn_like_a_kernel():
    draw = jax.jit(jax.vmap(lambda key: Predictor(CONFIG).init(key)["mask_token"]))
    tokens = np.asarray(draw(jax.random.split(jax.random.key(0), 1000)))
    assert abs(tokens.std() / 0.02 - 1) < 4 / np.sqrt(2 * tokens.size)


@pytest.mark.parametrize("module", [Encoder, Predictor])
def test_depth_rescale_divides_output_projections_only(module):
    config = vit("tiny", image=32, patch=4, depth=3, predictor_depth=3, depth_rescale=True)

    @jax.jit
    def draw(key):
        blocks = module(config).init(key)["blocks"]
        return blocks["mlp"]["up"], blocks["attention"]["out"], blocks["mlp"]["down"]

    roots = np.sqrt([2.0, 4.0, 6.0])
    for layer, divided in zip(draw(jax.random.key(0)), (1, roots, roots), strict=True):
        kernel = np.asarray(layer["kernel"])
        deviation = kernel.std((1, 2)) * divided
        np.testing.assert_allclose(deviation, 0.02, rtol=4 / np.sqrt(2 * kernel[0].size))


@pytest.mark.parametrize(
    "size, patch, encoder, predictor",
    [  # docs/papers/ijepa.md 1.3 and 1.4, in millions; our tiny and small have narrower predictors
        ("tiny", 16, 5.49, None),
        ("small", 16, 21.59, None),
        ("base", 16, 85.65, 11.24),
        ("large", 16, 303.10, 22.08),
        ("huge", 14, 630.43, 22.28),
        ("huge", 16, 630.66, 22.28),
        ("giant", 16, 1011.09, 29.48),
    ],
)
def test_parameter_counts(size, patch, encoder, predictor):
    config = vit(size, image=224, patch=patch)

    def millions(module):
        shapes = jax.eval_shape(module.init, jax.random.key(0))
        return round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 2)

    assert millions(Encoder(config)) == encoder
    if predictor:
        assert millions(Predictor(config)) == predictor


def test_huge_counts_exactly_with_its_table_of_positions():
    config = vit("huge", image=224, patch=14)
    shapes = jax.eval_shape(Encoder(config).init, jax.random.key(0))
    table = config.tokens * config.width
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) + table == 630_762_240


@pytest.mark.parametrize(
    "size, most, at_once", [(6, 2, 2), (6, 4, 3), (6, 6, 6), (5, 4, 1), (5, 5, 5)]
)
def test_the_frozen_view_is_the_same_in_groups(size, most, at_once):
    """The CPU's form takes few images at a time, as many as divide the batch. No gradient flows."""
    images = np.concatenate([IMAGES, IMAGES[::-1]])[:size]
    encoder = Encoder(CONFIG, Policy("float32", unroll=1, form="cpu", at_once=most))
    jaxpr = jax.make_jaxpr(encoder.frozen)(PARAMS, images)
    loops = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    # Over blocks, or over groups.
    outermost = CONFIG.depth if at_once == size else size // at_once
    assert [e.params["length"] for e in loops] == [outermost]
    got = encoder.frozen(PARAMS, images)
    assert relative_error(got, encode(PARAMS, images)) < 1e-6
    wanted = np.random.default_rng(0).integers(0, CONFIG.tokens, (size, 3))
    some = encoder.frozen(PARAMS, images, wanted)
    assert relative_error(some, np.asarray(got)[np.arange(size)[:, None], wanted]) < 1e-6
    for e in (encoder, ENCODER):
        gradient = jax.grad(lambda p, e=e: e.frozen(p, images).sum())(PARAMS)
        assert not any(np.any(g) for g in jax.tree.leaves(gradient))
