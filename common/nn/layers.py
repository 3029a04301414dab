"""Transformer layers as flax modules, shaped for the papers' models.

Legend: B batch, N tokens, D width, F hidden width, H heads, K head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.attention import attention
from common.nn.cpu import column_parts, fenced, fenced_gradient, summed_along, summed_over
from common.nn.policy import Policy

# Logical names of every parameter's axes, by the end of its path. Rules (common/sharding.py) map names to mesh axes.
LOGICAL_AXES = {
    "qkv/kernel": ("embed", "heads"),
    "qkv/bias": ("heads",),
    "attention/out/kernel": ("heads", "embed"),
    "mlp/up/kernel": ("embed", "mlp"),
    "mlp/up/bias": ("mlp",),
    "mlp/down/kernel": ("mlp", "embed"),
    "patch/proj/kernel": ("patch", "embed"),
    "out/bias": (None,),
    "down/bias": (None,),
    "proj/bias": (None,),
    "scale": (None,),
    "norm/bias": (None,),
    "norm1/bias": (None,),
    "norm2/bias": (None,),
}

INIT = nnx.initializers.normal(stddev=0.02)  # the released code truncates at 100 sigma: never


class Linear(nnx.Linear):
    """`nnx.Linear` with float32 parameters, computed under `policy`."""

    bias: nnx.Param[jax.Array]

    def __init__(self, n_in: int, n_out: int, policy: Policy, rngs: nnx.Rngs):
        super().__init__(n_in, n_out, kernel_init=INIT, rngs=rngs)
        self.policy = policy

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.policy.dense(x, self.kernel[...], self.bias[...])

    def parts(self, x: jax.Array, n: int) -> list[jax.Array]:
        """The same, its features in `n` equal parts."""
        return self.policy.dense_parts(x, self.kernel[...], self.bias[...], n)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU by erf, to 1e-6: jax.nn.gelu takes erfc, whose care for the far tail doubles the time."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 2**-0.5))


def _gelu_bwd(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    # erf(-x), not erf(x): XLA would keep erf(x) from the forward pass, which takes longer than computing it again.
    cdf = 0.5 - 0.5 * jax.lax.erf(x * -(2**-0.5))
    return (g * (cdf + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_bwd)


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation in float32 with the ViT's epsilon."""

    scale: nnx.Param[jax.Array]
    bias: nnx.Param[jax.Array]

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, epsilon=1e-6, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(self.epsilon, x, self.scale[...], self.bias[...])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer_norm(epsilon: float, x_ND: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    """Every token of x [..., D] to mean 0 and variance 1, times scale plus bias.

    The variance is E[x^2] - E[x]^2, flax's own way: both sums in one pass. The fences leave as many passes over x as there
    are sums that depend on each other; XLA's CPU backend takes three times as many for the gradient that it would derive.
    Sums are fenced rather than means, so that what little becomes of them is computed where it is used.
    """
    return _layer_norm_fwd(epsilon, x_ND, scale_D, bias_D)[0]


def _layer_norm_fwd(epsilon, x_ND, scale_D, bias_D):
    D = x_ND.shape[-1]
    mean_N1 = fenced(x_ND.sum(-1, keepdims=True)) / D
    square_N1 = fenced((x_ND**2).sum(-1, keepdims=True)) / D
    variance_N1 = jnp.maximum(square_N1 - mean_N1**2, 0)
    inverse_N1 = fenced(jax.lax.rsqrt(variance_N1 + epsilon))
    return (x_ND - mean_N1) * inverse_N1 * scale_D + bias_D, (x_ND, mean_N1, inverse_N1, scale_D)


def _layer_norm_bwd(epsilon, residuals, g_ND):
    x_ND, mean_N1, inverse_N1, scale_D = residuals
    D = x_ND.shape[-1]
    g_ND = fenced(g_ND)
    normed_ND = (x_ND - mean_N1) * inverse_N1
    product_ND = fenced(g_ND * normed_ND)
    along_mean_N1 = summed_along(g_ND, scale_D)[..., None] / D
    along_x_N1 = summed_along(product_ND, scale_D)[..., None] / D
    dx_ND = inverse_N1 * (g_ND * scale_D - along_mean_N1 - normed_ND * along_x_N1)
    return dx_ND, summed_over(product_ND), summed_over(g_ND)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


# Some tokens of a sequence: how many from the end, or their indices [B, K]. None: all.
Wanted = int | jax.Array | None


def take_tokens(x: jax.Array, wanted: Wanted) -> jax.Array:
    """`x` [B, N, ...] of the wanted tokens only, [B, K, ...]. Indices must lie in 0..N-1 (the masks assert it)."""
    if wanted is None:
        return x
    if isinstance(wanted, int):
        return x[:, x.shape[1] - wanted :]
    index = wanted.reshape(*wanted.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


class Attention(nnx.Module):
    """Multi-head self-attention with biased projections (docs/papers/ijepa.md 1.3), scores and softmax in float32.

    `valid`: see `common.nn.attention.attention`. `wanted`: see `Block`.
    """

    def __init__(self, width: int, heads: int, policy: Policy, rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.heads = heads
        self.policy = policy
        self.qkv = Linear(width, 3 * width, policy, rngs)
        self.out = Linear(width, width, policy, rngs)

    def __call__(
        self, x_BND: jax.Array, valid: jax.Array | None = None, wanted: Wanted = None
    ) -> jax.Array:
        B, N, D = x_BND.shape
        q, k, v = (y.reshape(B, N, self.heads, -1) for y in self.qkv.parts(x_BND, 3))
        mixed_BNHK: jax.Array = attention(self.policy.compute, take_tokens(q, wanted), k, v, valid)
        return self.out(mixed_BNHK.reshape(B, -1, D))


class MLP(nnx.Module):
    """Two linear layers with exact GELU, the hidden layer in as many parts as `column_parts` says."""

    def __init__(self, width: int, hidden: int, policy: Policy, rngs: nnx.Rngs):
        self.policy = policy
        self.up = Linear(width, hidden, policy, rngs)
        self.down = Linear(hidden, width, policy, rngs)

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        hidden = [gelu(h) for h in self.up.parts(x_BND, column_parts(*self.up.kernel.shape))]
        weights = jnp.split(self.down.kernel[...], len(hidden))
        biases = [self.down.bias[...]] + [None] * (len(hidden) - 1)
        return jnp.asarray(sum(map(self.policy.dense, hidden, weights, biases)))


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)). LayerNorm eps 1e-6.

    `wanted`: the tokens that leave the block; all others are only attended to (`valid`, where it is for each query, is
    for these). None: all.
    """

    def __init__(self, width: int, heads: int, hidden: int, policy: Policy, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, policy, rngs)
        self.norm2 = LayerNorm(width, rngs=rngs)
        self.mlp = MLP(width, hidden, policy, rngs)

    def __call__(
        self, x_BND: jax.Array, valid: jax.Array | None = None, wanted: Wanted = None
    ) -> jax.Array:
        x_BND = fenced_gradient(x_BND)
        mixed_BND = self.attention(self.norm1(x_BND), valid, wanted)
        x_BND = fenced_gradient(take_tokens(x_BND, wanted) + mixed_BND)
        return x_BND + self.mlp(self.norm2(x_BND))
