"""Softmax attention whose products take the policy's operands, forward and backward.

Legend: B batch, N queries, M keys, H heads, K head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from common.nn.cpu import fenced, laid_out, rounded


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    compute: str,
    q_BNHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    valid: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, [B, N, H, K], in float32, as are scores and softmax; rounded as the next product takes it.

    Args:
      compute: operand type of the products, "bfloat16" or "float32".
      valid: False marks what may not be attended to: keys for all queries, [B, M], or for each, [B, N, M] ([1, N, M] for
        the same in every example, such as the past). None: all are seen.
    """
    return _forward(compute, q_BNHK, k_BMHK, v_BMHK, valid)[0]


def _forward(compute, q_BNHK, k_BMHK, v_BMHK, valid):
    # A cast, then a copy with heads in front: inside the products both would cost several times as much.
    operands = fenced([rounded(x, compute) for x in (q_BNHK, k_BMHK, v_BMHK)])
    q_BHNK, k_BHMK, v_BHMK = map(_swap, operands)
    scores_BHNM = _einsum("BHNK,BHMK->BHNM", q_BHNK, k_BHMK) * q_BHNK.shape[-1] ** -0.5
    if valid is not None:
        by_query = valid if valid.ndim == 3 else valid[:, None]
        scores_BHNM = jnp.where(by_query[:, None], scores_BHNM, -1e30)
    weights_BHNM = jax.nn.softmax(scores_BHNM, axis=-1).astype(compute)
    out_BHNK = fenced(_einsum("BHNM,BHMK->BHNK", weights_BHNM, v_BHMK))
    out_BNHK = _swap(fenced(rounded(out_BHNK, compute)))  # in one pass, the two take twice as long
    return out_BNHK.astype(jnp.float32), (q_BHNK, k_BHMK, v_BHMK, weights_BHNM)


def _backward(compute, residuals, g_BNHK):
    q_BHNK, k_BHMK, v_BHMK, weights_BHNM = residuals
    g_BHNK = _swap(fenced(rounded(g_BNHK, compute)))
    dweights_BHNM = _einsum("BHNK,BHMK->BHNM", g_BHNK, v_BHMK)
    weights = weights_BHNM.astype(jnp.float32)
    dscores_BHNM = weights * (dweights_BHNM - (dweights_BHNM * weights).sum(-1, keepdims=True))
    dscores_BHNM = fenced((dscores_BHNM * q_BHNK.shape[-1] ** -0.5).astype(compute))
    dq_BHNK = fenced(_einsum("BHNM,BHMK->BHNK", dscores_BHNM, k_BHMK))
    dk_BHMK = fenced(_einsum("BHMN,BHNK->BHMK", laid_out(dscores_BHNM.swapaxes(2, 3)), q_BHNK))
    dv_BHMK = fenced(_einsum("BHMN,BHNK->BHMK", laid_out(weights_BHNM.swapaxes(2, 3)), g_BHNK))
    return *(d.swapaxes(1, 2) for d in (dq_BHNK, dk_BHMK, dv_BHMK)), None


attention.defvjp(_forward, _backward)


def _swap(x_BNHK: jax.Array) -> jax.Array:
    """Heads in front of tokens."""
    return laid_out(x_BNHK.swapaxes(1, 2))


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, precision=precision)
