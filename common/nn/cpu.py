"""The form that XLA's CPU backend needs, of the operations in ops.py and of what goes over a batch.

Everything here computes what the plain form says, with gradients written by hand, on one CPU device. Files called ops.py
import it. A fence keeps XLA from fusing how a value is computed into each of its uses. How much each piece brings, and
what was tried instead: docs/journal.md.

Legend: B examples, N tokens (queries), M keys, D features in, F features out, H heads, K head width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

# XLA keeps optimization barriers, which it otherwise drops early, and loops take the widest vectors there are.
COMPILER_OPTIONS = {
    "xla_disable_hlo_passes": "cse_barrier_expander",
    "xla_cpu_prefer_vector_width": "512",
}
# Bytes of a layer's activations up to which they stay in the caches.
CACHE_BYTES = 8 << 20
# Columns of a product's right operand that XLA takes at once.
BLOCK_BYTES = 128 << 10

fenced = lax.optimization_barrier


# Products.


def dense(compute: str, x: jax.Array, w_DF: jax.Array, b_F: jax.Array | None) -> jax.Array:
    """x [..., D] times w [D, F], plus b [F] if given, in float32 [..., F]."""
    y_NF: jax.Array = _dense(compute, x.reshape(-1, x.shape[-1]), w_DF, b_F)
    return y_NF.reshape(*x.shape[:-1], w_DF.shape[-1])


def dense_parts(
    compute: str, x: jax.Array, w_DF: jax.Array, b_F: jax.Array, parts: int
) -> list[jax.Array]:
    """`dense` in equal parts of its features, each [..., F / parts]: a product each where `column_parts` splits w."""
    if column_parts(*w_DF.shape) == 1:
        return jnp.split(dense(compute, x, w_DF, b_F), parts, axis=-1)
    columns = zip(jnp.split(w_DF, parts, axis=1), jnp.split(b_F, parts))
    return [dense(compute, x, w, b) for w, b in columns]


def mlp(
    compute: str,
    x: jax.Array,
    up: tuple[jax.Array, jax.Array],
    down: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """down(GELU(up(x))), the hidden layer in as many parts as `column_parts` says."""
    parts = column_parts(*up[0].shape)
    hidden = [gelu(h) for h in dense_parts(compute, x, *up, parts)]
    biases = [down[1]] + [None] * (parts - 1)
    return jnp.asarray(sum(map(partial(dense, compute), hidden, jnp.split(down[0], parts), biases)))


def column_parts(n_in: int, n_out: int) -> int:
    """Into how many parts to split the columns of a weight [n_in, n_out], so that each core keeps the rows it computed.

    With more columns than it takes at once, XLA gives each core a share of the columns. The next operation goes by rows
    again, and finds most of them in another core's cache. 1 where a split gains nothing: for weights so large that the
    product takes long compared with the movement.
    """
    fits = (p for p in range(1, 5) if n_out % p == 0 and 2 * n_in * n_out // p <= BLOCK_BYTES)
    return next(fits, 1)


def _dot(compute: str, a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """The product of two matrices that sums over axis over[0] of a and over[1] of b."""
    precision = lax.Precision.HIGHEST if compute == "float32" else None
    return lax.dot_general(
        a.astype(compute),
        b.astype(compute),
        (((over[0],), (over[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(compute: str, x_ND: jax.Array, w_DF: jax.Array, b_F: jax.Array | None) -> jax.Array:
    return _dense_fwd(compute, x_ND, w_DF, b_F)[0]


def _dense_fwd(compute, x_ND, w_DF, b_F):
    # The operands are kept as they were used: half the memory of float32.
    x, w = rounded(x_ND, compute), rounded(w_DF, compute)
    y_NF = _dot(compute, x, w, (1, 0))
    like = jax.tree.map(lambda p: jnp.zeros((), p.dtype), (x_ND, w_DF, b_F))
    return (y_NF if b_F is None else y_NF + b_F[None]), (x, w, like)


def _dense_bwd(compute, residuals, g_NF):
    x, w, (like_x, like_w, like_b) = residuals
    # One copy of the cotangent as all three take it, instead of a cast fused into each.
    g = fenced(rounded(g_NF, compute))
    dx_ND = _dot(compute, g, w, (1, 1))
    dw_DF = _dot(compute, x, g, (0, 0)) if compute == "float32" else _weight_gradient(x, g)
    db_F = None if like_b is None else g.sum(0, dtype=jnp.float32).astype(like_b.dtype)
    return dx_ND.astype(like_x.dtype), dw_DF.astype(like_w.dtype), db_F


_dense.defvjp(_dense_fwd, _dense_bwd)


def _weight_gradient(x_ND: jax.Array, g_NF: jax.Array) -> jax.Array:
    """x^T g as XLA multiplies bfloat16 fast: with a left operand that is summed over its last axis.

    The transpose must be a copy: left to itself, XLA folds it back into the slow product. It costs least on the narrower
    operand.
    """
    if x_ND.shape[1] > g_NF.shape[1]:
        return fenced(_weight_gradient(g_NF, x_ND)).T
    return _dot("bfloat16", transposed(x_ND), g_NF, (1, 0))


# Attention.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    compute: str,
    q_BNHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    seen: jax.Array | None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, [B, N, H, K], in float32, as are scores and softmax; rounded as the next product takes it.

    Args:
      seen: the keys that all queries attend to, [B, M], or each query, [B or 1, N, M]. None: all.
    """
    return _attention_fwd(compute, q_BNHK, k_BMHK, v_BMHK, seen)[0]


def _attention_fwd(compute, q_BNHK, k_BMHK, v_BMHK, seen):
    # A cast, then a copy with heads in front: inside the products both would cost several times as much.
    operands = fenced([rounded(x, compute) for x in (q_BNHK, k_BMHK, v_BMHK)])
    q_BHNK, k_BHMK, v_BHMK = map(_swap, operands)
    scores_BHNM = _einsum("BHNK,BHMK->BHNM", q_BHNK, k_BHMK) * q_BHNK.shape[-1] ** -0.5
    if seen is not None:
        by_query = seen if seen.ndim == 3 else seen[:, None]
        scores_BHNM = jnp.where(by_query[:, None], scores_BHNM, -1e30)
    weights_BHNM = jax.nn.softmax(scores_BHNM, axis=-1).astype(compute)
    out_BHNK = fenced(_einsum("BHNM,BHMK->BHNK", weights_BHNM, v_BHMK))
    out_BNHK = _swap(fenced(rounded(out_BHNK, compute)))  # in one pass, the two take twice as long
    return out_BNHK.astype(jnp.float32), (q_BHNK, k_BHMK, v_BHMK, weights_BHNM)


def _attention_bwd(compute, residuals, g_BNHK):
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


attention.defvjp(_attention_fwd, _attention_bwd)


def _swap(x_BNHK: jax.Array) -> jax.Array:
    """Heads in front of tokens."""
    return laid_out(x_BNHK.swapaxes(1, 2))


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, precision=precision)


# Layer norm, GELU and the residual stream.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer_norm(epsilon: float, x_ND: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    """Every token of x [..., D] to mean 0 and variance 1, times scale plus bias.

    The variance is E[x^2] - E[x]^2, flax's own way: both sums in one pass. The fences leave as many passes over x as there
    are sums that depend on each other; XLA takes three times as many for the gradient that it would derive.
    Sums are fenced rather than means, so that what little becomes of them is computed where it is used.
    """
    return _layer_norm_fwd(epsilon, x_ND, scale_D, bias_D)[0]


def _layer_norm_fwd(epsilon, x_ND, scale_D, bias_D):
    D = x_ND.shape[-1]
    mean_N1 = fenced(x_ND.sum(-1, keepdims=True)) / D
    square_N1 = fenced((x_ND**2).sum(-1, keepdims=True)) / D
    variance_N1 = jnp.maximum(square_N1 - mean_N1**2, 0)
    inverse_N1 = fenced(lax.rsqrt(variance_N1 + epsilon))
    scale, bias = (lax.broadcast_to_rank(p, x_ND.ndim) for p in (scale_D, bias_D))
    return (x_ND - mean_N1) * inverse_N1 * scale + bias, (x_ND, mean_N1, inverse_N1, scale_D)


def _layer_norm_bwd(epsilon, residuals, g_ND):
    x_ND, mean_N1, inverse_N1, scale_D = residuals
    D = x_ND.shape[-1]
    g_ND = fenced(g_ND)
    normed_ND = (x_ND - mean_N1) * inverse_N1
    product_ND = fenced(g_ND * normed_ND)
    along_mean_N1 = summed_along(g_ND, scale_D)[..., None] / D
    along_x_N1 = summed_along(product_ND, scale_D)[..., None] / D
    scale = lax.broadcast_to_rank(scale_D, g_ND.ndim)
    dx_ND = inverse_N1 * (g_ND * scale - along_mean_N1 - normed_ND * along_x_N1)
    return dx_ND, summed_over(product_ND), summed_over(g_ND)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU by erf, to 1e-6: jax.nn.gelu takes erfc, whose care for the far tail doubles the time."""
    return x * (0.5 + 0.5 * lax.erf(x * 2**-0.5))


def _gelu_bwd(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    # erf(-x), not erf(x): XLA would keep erf(x) from the forward pass, which takes longer than computing it again.
    cdf = 0.5 - 0.5 * lax.erf(x * -(2**-0.5))
    return (g * (cdf + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_bwd)


@jax.custom_vjp
def kept_gradient(x: jax.Array) -> jax.Array:
    """`x`, whose gradient is computed once. For the residual stream, where all blocks' gradients add up.

    XLA would otherwise sum the contributions of all later blocks again at every block.
    """
    return x


kept_gradient.defvjp(lambda x: (x, None), lambda _, g: (fenced(g),))


# A batch, a few examples at a time.


def in_groups(f: Callable, at_once: int, x: tuple) -> jax.Array:
    """`f(*x)` for an `f` that takes examples along the leading axis of all of `x` one by one, without a gradient."""
    size = len(jax.tree.leaves(x)[0])
    group = _fitting(size, at_once)
    if group == size:
        return f(*x)
    y = lax.map(lambda x: f(*x), _groups(group, x))
    return y.reshape(-1, *y.shape[2:])


def sum_in_groups(f: Callable, at_once: int, params: Any, x: Any, given: Any) -> jax.Array:
    """`f(params, x, given)`, a scalar that sums over the examples along the leading axis of all of `x` and `given`.

    Where a gradient is asked for, that of a group is computed with its value, while the activations are still in the
    caches. Gradients are of `params` and `x`.
    """
    size = len(jax.tree.leaves(x)[0])
    group = _fitting(size, at_once)
    if group == size:
        return f(params, x, given)
    return _sum_in_groups(f, group, params, x, given)


def examples_at_once(widest: int) -> int:
    """How many examples' largest activations, of `widest` float32 numbers each, the caches hold."""
    return max(1, CACHE_BYTES // (4 * widest))


def _fitting(size: int, most: int) -> int:
    """The size of the groups: a divisor of `size` that is at most `most`, or `size`."""
    divisors = [n for n in range(1, size + 1) if size % n == 0 and n <= most]
    # A batch that does not divide well would go through almost example by example.
    return max((n for n in divisors if 4 * n >= most), default=size)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_in_groups(f: Callable, at_once: int, params: Any, x: Any, given: Any) -> jax.Array:
    def add(total, group):
        return total + f(params, *group), None

    return lax.scan(add, jnp.zeros(()), _groups(at_once, (x, given)))[0]


def _sum_in_groups_fwd(f, at_once, params, x, given):
    def add(total, group):
        value, (d_params, d_x) = jax.value_and_grad(f, (0, 1))(params, *group)
        return jax.tree.map(jnp.add, total, (value, d_params)), d_x

    zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    (value, d_params), d_x = lax.scan(add, zero, _groups(at_once, (x, given)))
    return value, (d_params, jax.tree.map(lambda d: d.reshape(-1, *d.shape[2:]), d_x))


def _sum_in_groups_bwd(f, at_once, gradients, g):
    return *jax.tree.map(lambda d: g * d, gradients), None


_sum_in_groups.defvjp(_sum_in_groups_fwd, _sum_in_groups_bwd)


def _groups(at_once: int, examples: Any) -> Any:
    return jax.tree.map(lambda a: a.reshape(-1, at_once, *a.shape[1:]), examples)


# Casts, copies and sums.


def rounded(x: jax.Array, dtype: str) -> jax.Array:
    """`x` as type "bfloat16" or "float32", as products take it."""
    if dtype != "bfloat16" or x.dtype != jnp.float32:
        return x.astype(dtype)
    return _bfloat16(x)


@jax.custom_vjp
def _bfloat16(x: jax.Array) -> jax.Array:
    """float32 to the nearest bfloat16, ties to even, by bits: the same values as a cast (and NaN stays NaN).

    A loop that ends in XLA's own cast takes vectors of 8 numbers at most, not 16, and twice the time.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + jnp.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)


_bfloat16.defvjp(lambda x: (_bfloat16(x), None), lambda _, g: (g.astype(jnp.float32),))


def laid_out(x: jax.Array) -> jax.Array:
    """`x` in memory in the order of its axes: XLA would fold a transpose into the product that takes it, which then is
    slow."""
    return fenced(with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))))


def transposed(x_ND: jax.Array) -> jax.Array:
    """A copy of x^T, made block by block, which takes half as long as all at once."""
    N, D = x_ND.shape
    if N % 64:
        return laid_out(x_ND.T)
    blocks = fenced(x_ND.reshape(N // 64, 64, D).swapaxes(1, 2))
    return laid_out(blocks.swapaxes(0, 1)).reshape(D, N)


def summed_along(x_ND: jax.Array, weight_D: jax.Array) -> jax.Array:
    """The sum of x * weight [...] over the last axis, in float32, as a product, which reads x once."""
    return jnp.dot(x_ND, weight_D, precision=lax.Precision.HIGHEST)


def summed_over(x_ND: jax.Array) -> jax.Array:
    """The sum of x [D] over all axes but the last, in float32, as a product with ones."""
    x_ND = x_ND.reshape(-1, x_ND.shape[-1])
    return jnp.dot(jnp.ones(len(x_ND)), x_ND, precision=lax.Precision.HIGHEST)
