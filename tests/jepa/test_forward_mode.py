"""Forward mode goes through the models: jvp and linearize say what reverse mode says along the same direction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa.encoder import Encoder
from jepa.objective import ObjectiveSpec, ijepa_loss
from jepa.predictor import Predictor
from tests.jepa.small import CONFIG, FLOAT32, images, index_lists, padded_batch, random_params

ENCODER, PREDICTOR = Encoder(CONFIG, FLOAT32), Predictor(CONFIG, FLOAT32)
PARAMS = {"encoder": random_params(ENCODER, 1), "predictor": random_params(PREDICTOR, 2)}
TARGET = random_params(ENCODER, 3)
BATCH = padded_batch(*index_lists())


def encode(params):
    return ENCODER(params["encoder"], images().astype(np.float32) / 255)


def predict(params):
    z_BCD = np.random.default_rng(4).normal(size=(*BATCH["context"].shape, CONFIG.width))
    lengths = (BATCH[name].sum(-1) for name in ("context_valid", "target_valid"))
    masks = BATCH["context"], BATCH["targets"], *lengths
    return PREDICTOR(params["predictor"], z_BCD.astype(np.float32), *masks)


def loss(params):
    spec = ObjectiveSpec(vicreg=0.1)
    return ijepa_loss(ENCODER, PREDICTOR, spec, params, TARGET, BATCH, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("f", [encode, predict, loss])
def test_forward_mode_is_reverse_mode(f):
    rng = np.random.default_rng(5)
    direction = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), PARAMS)
    y, slope = jax.jit(lambda p, d: jax.jvp(f, (p,), (d,)))(PARAMS, direction)
    g = rng.normal(size=y.shape).astype(np.float32)
    gradient = jax.jit(lambda p: jax.vjp(f, p)[1](g)[0])(PARAMS)
    along = [(a * b).sum() for a, b in zip(*map(jax.tree.leaves, (gradient, direction)))]
    assert float(jnp.vdot(g, slope)) == pytest.approx(float(sum(along)), rel=2e-4)
    linear = jax.jit(lambda p, d: jax.linearize(f, p)[1](d))(PARAMS, direction)
    np.testing.assert_allclose(linear, slope, rtol=1e-4, atol=1e-4 * np.abs(slope).max())
