"""The I-JEPA objective: predict the EMA encoder's view of hidden blocks (docs/papers/ijepa.md 1.0).

Legend: B batch, M target blocks, C context tokens, T target tokens, N grid tokens, D width.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from common.augment import normalize
from common.metrics import Metrics, mean
from common.nn import ops
from common.nn.layers import take_tokens
from common.nn.module import Params
from jepa.encoder import Encoder
from jepa.predictor import Predictor


@dataclass(frozen=True)
class ObjectiveSpec:
    """Which loss is taken.

    Attributes:
      distance: "smooth_l1" (beta 1; the released code) or "l2" (the paper's text).
      center: subtract from every target its position's mean over the batch, before the norm. Not in the paper (False):
        what position alone predicts is then no part of the loss, which short runs otherwise spend themselves on.
      position_noise: StoP's sigma on mask positions; 0.25 in its paper, 0 for I-JEPA.
      vicreg: factor on C-JEPA's terms; 0 for I-JEPA.
      variance: factor on C-JEPA's variance term, itself times `vicreg` (Mo & Tong, NeurIPS 2024; docs/papers/ijepa.md 6.1).
      covariance: factor on its covariance term.  invariance: factor on its distance of pooled context and target.
    """

    distance: str = "smooth_l1"
    center: bool = False
    position_noise: float = 0.0
    vicreg: float = 0.0
    variance: float = 25.0
    covariance: float = 1.0
    invariance: float = 25.0

    def __post_init__(self):
        if self.distance not in ("smooth_l1", "l2"):
            raise ValueError(
                f"objective.distance={self.distance!r} is unknown: 'smooth_l1' or 'l2'"
            )
        if min(self.position_noise, self.vicreg) < 0:
            raise ValueError("objective.position_noise and objective.vicreg must not be negative")


def ijepa_loss(
    encoder: Encoder,
    predictor: Predictor,
    spec: ObjectiveSpec,
    params: Params,
    target_params: Params,
    batch: dict[str, Any],
    key: jax.Array | None,
) -> tuple[jax.Array, Metrics]:
    """The loss of one batch, and its metrics.

    Args:
      params: {"encoder", "predictor"}; target_params: the EMA encoder's parameters.
      batch: "image" uint8 [B, H, W, 3]; "context" int32 [B, C]; "targets" int32 [B, M, T]; and, where the masks are
        padded, "context_valid" bool [B, C] and "target_valid" bool [B, M, T].
      key: the step's key (only StoP draws from it).
    """
    images = normalize(batch["image"])
    context_valid, target_valid = batch.get("context_valid"), batch.get("target_valid")

    # 1. Targets: the EMA encoder sees the whole image; the blocks are gathered; a second, affine-free norm.
    B, M, T = batch["targets"].shape
    blocks_BK = batch["targets"].reshape(B, M * T)
    if spec.center or spec.vicreg:  # these take all tokens
        h_BND = encoder.frozen(target_params, images)
        h_BKD = take_tokens(
            h_BND - h_BND.mean(0, keepdims=True) if spec.center else h_BND, blocks_BK
        )
    else:
        h_BKD = encoder.frozen(target_params, images, blocks_BK)
    target_BMTD = feature_norm(h_BKD).reshape(B, M, T, -1)

    # 2. Context: the online encoder sees only the context tokens.
    z_BCD = encoder(params["encoder"], images, batch["context"], lengths(context_valid))

    # 3. Prediction of every block, and the mean distance over valid tokens and features.
    loss = prediction_error(predictor, spec, params["predictor"], z_BCD, target_BMTD, batch, key)

    metrics = {"loss_prediction": mean(loss)}
    if spec.vicreg:
        pooled_context = weighted_mean(z_BCD, context_valid, axis=1)
        terms = vicreg_terms(pooled_context, h_BND.mean(1))
        loss += spec.vicreg * sum(getattr(spec, name) * value for name, value in terms.items())
        metrics |= {f"loss_{name}": mean(value) for name, value in terms.items()}
    metrics |= {
        "loss": mean(loss),
        "target_std": mean(token_std(target_BMTD, target_valid)),
        "context_std": mean(pooled_std(z_BCD, context_valid)),
    }
    return loss, metrics


def prediction_error(
    predictor: Predictor,
    spec: ObjectiveSpec,
    params: Params,
    z_BCD: jax.Array,
    target_BMTD: jax.Array,
    batch: dict[str, Any],
    key: jax.Array | None,
) -> jax.Array:
    """The mean distance of all predictions from their targets; `params` are the predictor's."""

    def errors(params, z_BCD, given):
        target_BMTD, batch, noise_BMTD = given
        prediction_BMTD = predictor(
            params,
            z_BCD,
            batch["context"],
            batch["targets"],
            lengths(batch.get("context_valid")),
            lengths(batch.get("target_valid")),
            noise_BMTD,
        )
        return distance(prediction_BMTD - target_BMTD, spec.distance).mean(-1)

    masks = {name: value for name, value in batch.items() if name != "image"}
    given = target_BMTD, masks, predictor.noise(key, batch["targets"])
    valid_BMT = batch.get("target_valid")
    return ops.mean_over_examples(predictor.policy, errors, params, z_BCD, given, valid_BMT)


def lengths(valid: jax.Array | None) -> jax.Array | None:
    """How many tokens there are before the padding [...], of bool [..., K]; None: no padding."""
    return None if valid is None else valid.sum(-1, dtype=jnp.int32)


def feature_norm(x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """LayerNorm over the last axis with no parameters."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + eps)


def distance(difference: jax.Array, kind: str) -> jax.Array:
    """Elementwise smooth-L1 with beta 1 (Huber), or squared error."""
    if kind == "l2":
        return difference**2
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * difference**2, size - 0.5)


def weighted_mean(
    x: jax.Array, valid: jax.Array | None, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """Mean of `x` over `axis` (default all), over valid entries only; `valid` has x's leading axes."""
    if valid is None:
        return x.mean(axis)
    weight = valid.astype(x.dtype).reshape(*valid.shape, *(1,) * (x.ndim - valid.ndim))
    return (x * weight).sum(axis) / jnp.maximum(weight.sum(axis), 1)


def token_std(x_BMTD: jax.Array, valid_BMT: jax.Array | None) -> jax.Array:
    """Standard deviation over all valid tokens, mean over features."""
    mean_D = weighted_mean(x_BMTD, valid_BMT, axis=(0, 1, 2))
    centred = x_BMTD - jax.lax.broadcast_to_rank(mean_D, 4)
    return jnp.sqrt(weighted_mean(centred**2, valid_BMT, axis=(0, 1, 2))).mean()


def pooled_std(z_BCD: jax.Array, valid_BC: jax.Array | None) -> jax.Array:
    """Standard deviation over the batch of the pooled context, mean over features: falls to 0 in collapse."""
    return jax.lax.stop_gradient(weighted_mean(z_BCD, valid_BC, axis=1)).std(0).mean()


def vicreg_terms(context_BD: jax.Array, target_BD: jax.Array) -> dict[str, jax.Array]:
    """VICReg's terms (Bardes et al., 2022, eq. 1 to 5) between pooled context and (constant) target embeddings.

    Variance is a hinge on each feature's standard deviation at 1; covariance the mean square of what is off the
    diagonal; invariance the squared distance.
    """
    B, D = context_BD.shape
    centred = context_BD - context_BD.mean(0, keepdims=True)
    std = jnp.sqrt(centred.var(0) * B / max(B - 1, 1) + 1e-4)
    covariance_DD = centred.T @ centred / max(B - 1, 1)
    off_diagonal = covariance_DD - jnp.diag(jnp.diag(covariance_DD))
    return {
        "variance": jax.nn.relu(1 - std).mean(),
        "covariance": (off_diagonal**2).sum() / D,
        "invariance": ((context_BD - target_BD) ** 2).mean(),
    }
