"""Collapse monitors on frozen features: each a pure, jitted function of arrays (docs/papers/ijepa.md 6.3).

They say that, and how, training has collapsed. None of them can choose a checkpoint: on small data,
loss falls and rank rises while accuracy decays (docs/papers/ijepa.md 6.2).

Legend: B images, N tokens (patches, row by row), K predicted slots, D features, R rows of either.
"""

import functools

import jax
import jax.numpy as jnp

_einsum = functools.partial(jnp.einsum, precision="highest")  # TPU and GPU round float32 otherwise


def _unit(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x, jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@jax.jit
def pooled_std(z_BD: jax.Array) -> jax.Array:
    """Mean over features of the standard deviation over images.

    In [0, inf); 0 says that all images look the same. It scales with the features: see
    `normalized_std`.
    """
    return z_BD.std(axis=0).mean()


@jax.jit
def normalized_std(z_BD: jax.Array) -> jax.Array:
    """`pooled_std` of L2-normalised features (Chen & He 2021, SimSiam, section 4.1).

    In [0, 1 / sqrt(D)]: 0 for collapse, near 1 / sqrt(D) for directions spread over the sphere. The
    scale of an image's features does not matter.
    """
    return pooled_std(_unit(z_BD))


@jax.jit
def rankme(z_RD: jax.Array) -> jax.Array:
    """Effective rank exp(-sum_k p_k ln p_k), p = singular values / their sum (Garrido et al. 2023).

    In [1, min(R, D)], and 1 for all zeros. Scale and rotation do not matter. As in the paper,
    features are not centred; the 1e-7 that it adds to p is left out, as 0 ln 0 is taken as 0.
    """
    # Not from the eigenvalues of the Gram matrix: in float32 their roots are noise below 3e-4 of
    # the largest, and D of those add up to a rank of their own.
    sigma = jnp.linalg.svd(z_RD.astype(jnp.float32), compute_uv=False)
    p = sigma / jnp.maximum(sigma.sum(), jnp.finfo(jnp.float32).tiny)
    return jnp.exp(-jax.scipy.special.xlogy(p, p).sum())


@jax.jit
def token_rankme(tokens_BND: jax.Array) -> jax.Array:
    """`rankme` over the tokens of all images together, in [1, min(B N, D)].

    High here but low for pooled features: tokens tell places apart, not images.
    """
    return rankme(tokens_BND.reshape(-1, tokens_BND.shape[-1]))


@jax.jit
def cross_sample_gap(
    pred_BKD: jax.Array,
    target_BND: jax.Array,
    index_BK: jax.Array,
    valid_BK: jax.Array | None = None,
) -> jax.Array:
    """Mean of cos(prediction, own target) - cos(prediction, another image's target there).

    Lies in [-2, 2]. 0 says that predictions ignore the image and know the position at most, whatever the
    loss says (docs/papers/ijepa.md 6.3). The second term is the mean over all other images.

    Args:
      pred_BKD: predictions of K patches of each image.
      target_BND: the targets of all patches, as the loss sees them (layer-normalised).
      index_BK: which of the N patches each prediction is for.
      valid_BK: True (or 1) where a slot is real; others are ignored.
    """
    B = pred_BKD.shape[0]
    if B < 2:
        raise ValueError(f"cross_sample_gap compares images: needs two or more, got {B}")
    pred_BKD, target_BND = _unit(pred_BKD), _unit(target_BND)
    own_BKD = jnp.take_along_axis(target_BND, index_BK[..., None], axis=1)
    others_BKD = (target_BND.sum(0)[index_BK] - own_BKD) / (B - 1)
    gap_BK = _einsum("bkd,bkd->bk", pred_BKD, own_BKD - others_BKD)
    return jnp.average(gap_BK, weights=None if valid_BK is None else valid_BK.astype(gap_BK.dtype))


@functools.partial(jax.jit, static_argnames="grid")
def token_position_r2(
    tokens_BND: jax.Array, grid: tuple[int, int], ridge: float = 1e-3
) -> jax.Array:
    """R^2 of a ridge regression from a token to its (row, column): is a token its place?

    Fitted on the even images, measured on the odd ones, averaged over the coordinates that vary. At
    most 1; near 0 when tokens carry no position, and below it when the fit does worse than the mean.
    Random initialisation gives about 1, as positions are added to tokens; healthy training falls below
    0.9; a value that stays at 1 while `rankme` falls is positional collapse (docs/papers/ijepa.md 6.3).

    Args:
      tokens_BND: of at least two images, N = rows x columns, row by row.
      grid: (rows, columns).
      ridge: penalty, as a fraction of the mean variance of a feature, so that neither scale nor
        rotation matters.
    """
    B, N, D = tokens_BND.shape
    rows, cols = grid
    if rows * cols != N or N < 2 or B < 2:
        raise ValueError(
            f"tokens of shape {tokens_BND.shape} do not fit a {rows} x {cols} grid: "
            "pass two images or more of rows * columns patches, two or more"
        )
    place_NP = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(cols), indexing="ij"), -1)
    axes = [axis for axis, size in enumerate(grid) if size > 1]
    place_NP = place_NP.reshape(N, 2)[:, jnp.array(axes)].astype(jnp.float32)
    place_NP = (place_NP - place_NP.mean(0, keepdims=True)) / place_NP.std(
        0, keepdims=True
    )  # R^2 = 1 - mean square error

    tokens_BND = tokens_BND.astype(jnp.float32)
    rounding = 1e-10 * jnp.square(tokens_BND).mean()  # what centring may leave of a constant
    tokens_BND = tokens_BND - tokens_BND[::2].mean((0, 1), keepdims=True)
    fit_BND, test_BND = tokens_BND[::2], tokens_BND[1::2]
    rows_fit = fit_BND.shape[0] * N
    cov_DD = _einsum("bnd,bne->de", fit_BND, fit_BND) / rows_fit
    cross_DP = _einsum("bnd,np->dp", fit_BND, place_NP) / rows_fit
    penalty = ridge * jnp.trace(cov_DD) / D + rounding + jnp.finfo(jnp.float32).tiny
    weight_DP = jnp.linalg.solve(cov_DD + penalty * jnp.eye(D), cross_DP)
    error_BNP = _einsum("bnd,dp->bnp", test_BND, weight_DP) - place_NP[None]
    return 1 - jnp.square(error_BNP).mean()


@functools.partial(jax.jit, static_argnames="grid")
def _report(tokens_BND, grid, prediction):
    z_BD = tokens_BND.mean(axis=1, dtype=jnp.float32)
    values = {
        "pooled_std": pooled_std(z_BD),
        "normalized_std": normalized_std(z_BD),
        "rankme": rankme(z_BD),
        "token_rankme": token_rankme(tokens_BND),
        "token_position_r2": token_position_r2(tokens_BND, grid),
    }
    if prediction is not None:
        values["cross_sample_gap"] = cross_sample_gap(*prediction)
    return values


def report(
    tokens_BND: jax.Array, grid: tuple[int, int], prediction: tuple[jax.Array, ...] | None = None
) -> dict[str, float]:
    """All monitors of one batch by name, for the log.

    Args:
      tokens_BND: the target encoder's last layer on images without augmentation. `rankme` is
        bounded by the number of images, so take more than D of them.
      grid: (rows, columns) of patches.
      prediction: the arguments of `cross_sample_gap`, which is left out without them.
    """
    return {k: float(v) for k, v in _report(tokens_BND, tuple(grid), prediction).items()}
