"""Transformer layers as flax modules, shaped for the papers' models.

Legend: B batch, N tokens, D width, F hidden width, H heads, K head width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn import ops
from common.nn.ops import Policy

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

    @property
    def weights(self) -> ops.Weights:
        return self.kernel[...], self.bias[...]

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.dense(self.policy, x, *self.weights)


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation in float32 with the ViT's epsilon, 1e-6."""

    scale: nnx.Param[jax.Array]
    bias: nnx.Param[jax.Array]

    def __init__(self, width: int, policy: Policy, rngs: nnx.Rngs):
        super().__init__(width, epsilon=1e-6, rngs=rngs)
        self.policy = policy

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.layer_norm(self.policy, x, self.scale[...], self.bias[...], self.epsilon)


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

    `lengths_B`, `causal`: see `common.nn.ops.attention`. `wanted`: see `Block`.
    """

    def __init__(
        self, width: int, heads: int, policy: Policy, rngs: nnx.Rngs, *, causal: bool = False
    ):
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.heads = heads
        self.policy = policy
        self.causal = causal
        self.qkv = Linear(width, 3 * width, policy, rngs)
        self.out = Linear(width, width, policy, rngs)

    def __call__(
        self, x_BND: jax.Array, lengths_B: jax.Array | None = None, wanted: Wanted = None
    ) -> jax.Array:
        B, N, D = x_BND.shape
        q, k, v = (
            y.reshape(B, N, self.heads, -1) for y in ops.qkv(self.policy, x_BND, self.qkv.weights)
        )
        q = take_tokens(q, wanted)
        mixed_BNHK = ops.attention(self.policy, q, k, v, lengths_B, self.causal)
        return self.out(mixed_BNHK.reshape(B, -1, D))


class MLP(nnx.Module):
    """Two linear layers with exact GELU."""

    def __init__(self, width: int, hidden: int, policy: Policy, rngs: nnx.Rngs):
        self.policy = policy
        self.up = Linear(width, hidden, policy, rngs)
        self.down = Linear(hidden, width, policy, rngs)

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        return ops.mlp(self.policy, x_BND, self.up.weights, self.down.weights)


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    `lengths_B`: where sequences end, see `common.nn.ops.attention`. `wanted`: the tokens that leave the block; all others
    are only attended to. None: all. `causal`: a token attends to those before it only.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        policy: Policy,
        rngs: nnx.Rngs,
        *,
        causal: bool = False,
    ):
        self.policy = policy
        self.norm1 = LayerNorm(width, policy, rngs)
        self.attention = Attention(width, heads, policy, rngs, causal=causal)
        self.norm2 = LayerNorm(width, policy, rngs)
        self.mlp = MLP(width, hidden, policy, rngs)

    def __call__(
        self, x_BND: jax.Array, lengths_B: jax.Array | None = None, wanted: Wanted = None
    ) -> jax.Array:
        mixed_BND = self.attention(self.norm1(x_BND), lengths_B, wanted)
        x_BND = ops.residual(self.policy, take_tokens(x_BND, wanted), mixed_BND)
        return ops.residual(self.policy, x_BND, self.mlp(self.norm2(x_BND)))
