"""Softmax attention whose products take the policy's operands, forward and backward.

Legend: B batch, N queries, M keys, H heads, K head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    compute: str,
    q_BNHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    valid: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, [B, N, H, K] in the operands' type; scores and softmax in float32.

    Heads stay where the projection put them: no copy that brings them to the front (the copies cost more than the
    products for the few tokens of a small image).

    Args:
      compute: operand type of the products, "bfloat16" or "float32".
      valid: False marks what may not be attended to: keys for all queries, [B, M], or for each, [B, N, M] ([1, N, M] for
        the same in every example, such as the past). None: all are seen.
    """
    return _forward(compute, q_BNHK, k_BMHK, v_BMHK, valid)[0]


def _forward(compute, q_BNHK, k_BMHK, v_BMHK, valid):
    q, k, v = (x.astype(compute) for x in (q_BNHK, k_BMHK, v_BMHK))
    scores_BHNM = _einsum("BNHK,BMHK->BHNM", q, k) * q.shape[-1] ** -0.5
    if valid is not None:
        by_query = valid if valid.ndim == 3 else valid[:, None]
        scores_BHNM = jnp.where(by_query[:, None], scores_BHNM, -1e30)
    weights_BHNM = jax.nn.softmax(scores_BHNM, axis=-1).astype(compute)
    out_BNHK = _einsum("BHNM,BMHK->BNHK", weights_BHNM, v).astype(compute)
    like = tuple(jnp.zeros((), x.dtype) for x in (q_BNHK, k_BMHK, v_BMHK))
    return out_BNHK, (q, k, v, weights_BHNM, like)


def _backward(compute, residuals, g_BNHK):
    q, k, v, weights_BHNM, like = residuals
    g = g_BNHK.astype(compute)
    dweights_BHNM = _einsum("BNHK,BMHK->BHNM", g, v)
    weights = weights_BHNM.astype(jnp.float32)
    dscores_BHNM = weights * (dweights_BHNM - (dweights_BHNM * weights).sum(-1, keepdims=True))
    dscores = (dscores_BHNM * q.shape[-1] ** -0.5).astype(compute)
    dq = _einsum("BHNM,BMHK->BNHK", dscores, k)
    dk = _einsum("BHNM,BNHK->BMHK", dscores, q)
    dv = _einsum("BHNM,BNHK->BMHK", weights_BHNM, g)
    return (*(d.astype(x.dtype) for d, x in zip((dq, dk, dv), like)), None)


attention.defvjp(_forward, _backward)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, precision=precision)
