"""The predictor against the float64 reference: positions, mask tokens, separate blocks, padding, StoP.

Legend: B images, M target blocks, C context slots, T target slots, D encoder width, P predictor width.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jepa.predictor import Predictor
from tests.jepa import reference
from tests.jepa.small import (
    CONFIG,
    FLOAT32,
    M,
    index_lists,
    padded_batch,
    random_params,
    relative_error,
)

PREDICTOR = Predictor(CONFIG, FLOAT32)
PARAMS = random_params(PREDICTOR, 1)
CONTEXTS, TARGETS = index_lists()
BATCH = padded_batch(CONTEXTS, TARGETS)
LENGTHS = [BATCH[k].sum(-1) for k in ("context_valid", "target_valid")]
MASKS = [BATCH["context"], BATCH["targets"], *LENGTHS]
Z_BCD = np.random.default_rng(2).standard_normal((*MASKS[0].shape, CONFIG.width)).astype(np.float32)

predict = jax.jit(PREDICTOR.__call__)


@pytest.mark.parametrize("heads", [4, None], ids=["own heads", "the encoder's heads"])
def test_matches_the_reference(heads):
    config = replace(CONFIG, predictor_width=24, predictor_heads=heads)
    predictor = Predictor(config, FLOAT32)
    params = random_params(predictor, 1)
    context = np.stack([indices[:4] for indices in CONTEXTS])
    targets = np.stack([[block[:2] for block in blocks] for blocks in TARGETS])
    got = np.asarray(jax.jit(predictor.__call__)(params, Z_BCD[:, :4], context, targets))
    for b, blocks in enumerate(targets):
        for m, block in enumerate(blocks):
            want = reference.predict(params, config, Z_BCD[b, :4], context[b], block)
            assert relative_error(got[b, m], want) < 1e-5


def test_matches_the_reference_on_padded_masks():
    got = np.asarray(predict(PARAMS, Z_BCD, *MASKS))
    for b, (context, blocks) in enumerate(zip(CONTEXTS, TARGETS)):
        for m, block in enumerate(blocks):
            z = Z_BCD[b, : len(context)]
            want = reference.predict(PARAMS, CONFIG, z, context, block)
            assert relative_error(got[b, m, : len(block)], want) < 1e-5


def test_what_padding_holds_changes_nothing():
    target_valid, context_valid = BATCH["target_valid"], BATCH["context_valid"]
    other = padded_batch(CONTEXTS, TARGETS, fill=CONFIG.tokens - 1)
    z = np.where(context_valid[..., None], Z_BCD, 1e3)
    same = predict(PARAMS, z, other["context"], other["targets"], *MASKS[2:])
    got = predict(PARAMS, Z_BCD, *MASKS)
    np.testing.assert_array_equal(np.asarray(got)[target_valid], np.asarray(same)[target_valid])


def test_target_blocks_never_see_each_other():
    context, targets, *rest = MASKS
    moved = targets.copy()
    moved[:, 1] = (moved[:, 1] + 1) % CONFIG.tokens
    got = np.asarray(predict(PARAMS, Z_BCD, *MASKS))
    other = np.asarray(predict(PARAMS, Z_BCD, context, moved, *rest))
    np.testing.assert_array_equal(got[:, 0], other[:, 0])
    assert M == 2 and (got[:, 1] != other[:, 1]).any()


def test_stop_noise_enters_at_target_positions_only():
    """Mask tokens become A n + position + shared token, with A the input projection's kernel; the context stays clean
    (Bar et al., ICML 2024). The reference adds this very draw at the mask tokens and nowhere else."""
    sigma, key = 0.25, jax.random.key(3)
    noisy = Predictor(CONFIG, FLOAT32, position_noise=sigma)
    noise = sigma * np.asarray(jax.random.normal(key, (*MASKS[1].shape, CONFIG.width)))
    np.testing.assert_array_equal(noisy.noise(key, MASKS[1]), noise)
    got = np.asarray(jax.jit(noisy.__call__)(PARAMS, Z_BCD, *MASKS, noise))
    for b, (context, blocks) in enumerate(zip(CONTEXTS, TARGETS)):
        for m, block in enumerate(blocks):
            n, z = noise[b, m, : len(block)], Z_BCD[b, : len(context)]
            want = reference.predict(PARAMS, CONFIG, z, context, block, n)
            assert relative_error(got[b, m, : len(block)], want) < 1e-5


def test_stop_is_off_without_sigma_or_key():
    noisy = Predictor(CONFIG, FLOAT32, position_noise=0.25)
    assert noisy.noise(None, MASKS[1]) is None
    assert Predictor(CONFIG, FLOAT32).noise(jax.random.key(0), MASKS[1]) is None
