"""How models compute: one policy, and the operations of a transformer's layers under it.

Each operation stands here in its plain form, which is what the papers write and what GPUs and TPUs run. Where another form
pays on a backend, the policy's `form` takes it. It is decided when a program is built, from the devices of its mesh
(`Policy.built_for`). tests/common/test_ops.py holds each pair of forms equal in value and gradient.

Products take operands of the policy's type, sum in float32, and round the sum to that type, in the backward pass too: so
the gradients of weights cross devices in that type, which halves the bytes.

Legend: B examples, N tokens (queries), M keys, D features in, F features out, H heads, K head width; ... any leading axes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from common.nn import cpu

FORMS = ("plain", "cudnn", "cpu")
FUSED_FROM = 256  # keys from which cuDNN's attention is worth its call
Weights = tuple[jax.Array, jax.Array]  # kernel [D, F], bias [F]


@dataclass(frozen=True)
class Policy:
    """How models compute. Parameters, residual stream, norms, softmax and losses are always float32.

    Attributes:
      compute: operand type of products, "bfloat16" or "float32". Accumulation is float32.
      remat: whether each block's activations are computed again in the backward pass (large models).
      unroll: blocks per turn of the depth loop; None takes 1, which keeps programs small, and the whole depth in the CPU's
        form, where slicing parameters out of the stack costs a copy.
      batch_axes: mesh axes over which activations' leading axis is split; () leaves sharding to the compiler.
      form: of each operation, "plain", "cudnn" (fused attention on NVIDIA GPUs) or "cpu" (common/nn/ops.py). None takes
        what `built_for` finds to fit the mesh, and "plain" without it. Only "plain" has forward mode.
      at_once: the most examples that the CPU's form takes at once where each is on its own; None: all.
    """

    compute: str = "bfloat16"
    remat: bool = False
    unroll: int | None = None
    batch_axes: tuple[str, ...] = ()
    form: str | None = None
    at_once: int | None = None

    def __post_init__(self):
        if self.compute not in ("bfloat16", "float32"):
            raise ValueError(f"policy.compute={self.compute!r}: must be 'bfloat16' or 'float32'")
        if self.form is not None and self.form not in FORMS:
            raise ValueError(f"policy.form={self.form!r}: must be None or one of {FORMS}")
        for name in ("unroll", "at_once"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"policy.{name}={value}: None (automatic) or a positive count")

    def built_for(self, mesh: Mesh, widest: int | None = None) -> "Policy":
        """The policy with the form that fits the mesh's devices, or "plain" where that is set.

        `widest`: numbers in the largest activation of one example, for `at_once`. Raises ValueError for a form that needs
        other devices.
        """
        platform, fitting = mesh.devices.flat[0].platform, "plain"
        if platform == "cpu" and mesh.size == 1:  # its form knows nothing of shardings
            fitting = "cpu"
        elif platform in ("gpu", "cuda"):
            fitting = "cudnn"
        form = self.form or fitting
        if form not in ("plain", fitting):
            raise ValueError(
                f"policy.form={form!r} does not run on a mesh of {mesh.size} x {platform}: None takes {fitting!r}"
            )
        at_once = self.at_once
        if form == "cpu" and at_once is None and widest:
            at_once = cpu.examples_at_once(widest)
        return replace(self, form=form, at_once=at_once)

    def blocks_per_turn(self, depth: int) -> int:
        """Blocks laid out per loop turn for a stack of `depth` blocks."""
        if self.unroll:
            return min(self.unroll, depth)
        return depth if self.form == "cpu" else 1

    def constrain(self, x: jax.Array) -> jax.Array:
        """Pins an activation's leading axis to the batch's mesh axes: weights move instead of activations."""
        if not self.batch_axes:
            return x
        spec = jax.P(self.batch_axes, *[jax.P.UNCONSTRAINED] * (x.ndim - 1))
        return lax.with_sharding_constraint(x, spec)


def dense(policy: Policy, x: jax.Array, w_DF: jax.Array, b_F: jax.Array | None = None) -> jax.Array:
    """x [..., D] times w [D, F], plus b [F] if given, in float32 [..., F]."""
    if policy.form == "cpu":
        return cpu.dense(policy.compute, x, w_DF, b_F)
    operands = x.astype(policy.compute), w_DF.astype(policy.compute)
    y = jnp.matmul(*operands, precision=_precision(policy)).astype(jnp.float32)
    return y if b_F is None else y + lax.broadcast_to_rank(b_F, y.ndim)


def qkv(policy: Policy, x: jax.Array, weights: Weights) -> list[jax.Array]:
    """Queries, keys and values, each [..., F / 3], of one product with weights of [D, F]."""
    if policy.form == "cpu":
        return cpu.dense_parts(policy.compute, x, *weights, parts=3)
    return jnp.split(dense(policy, x, *weights), 3, axis=-1)


def attention(
    policy: Policy,
    q_BNHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    lengths_B: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, [B, N, H, K] in float32, as are scores and softmax.

    Args:
      lengths_B: int32, how many keys there are; those after them are padding, which nothing attends to. None: all.
      causal: a query attends to the keys up to its own place only.
    """
    if policy.form == "cpu":
        seen = _seen(q_BNHK.shape[1], k_BMHK.shape[1], lengths_B, causal)
        return cpu.attention(policy.compute, q_BNHK, k_BMHK, v_BMHK, seen)
    N, (_, M, _, K) = q_BNHK.shape[1], k_BMHK.shape
    even = N % 2 == M % 2 == 0  # jax 0.10.2 refuses odd lengths wherever a gradient is asked for
    cudnn_takes = policy.compute == "bfloat16" and K <= 128 and K % 8 == 0 and even
    fused = policy.form == "cudnn" and cudnn_takes and M >= FUSED_FROM
    operands = (x.astype(policy.compute) for x in (q_BNHK, k_BMHK, v_BMHK))
    with jax.default_matmul_precision(_precision(policy)):
        mixed_BNHK = jax.nn.dot_product_attention(
            *operands,
            is_causal=causal,
            key_value_seq_lengths=lengths_B,
            implementation="cudnn" if fused else "xla",
        )
    return mixed_BNHK.astype(jnp.float32)


def layer_norm(
    policy: Policy, x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float
) -> jax.Array:
    """Every token of x [..., D] to mean 0 and variance 1, times scale plus bias, in float32."""
    if policy.form == "cpu":
        return cpu.layer_norm(epsilon, x, scale_D, bias_D)
    scale, bias = (lax.broadcast_to_rank(p, x.ndim) for p in (scale_D, bias_D))
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale + bias


def gelu(policy: Policy, x: jax.Array) -> jax.Array:
    """Exact GELU: x times the normal distribution's share below it."""
    if policy.form == "cpu":
        return cpu.gelu(x)
    return jax.nn.gelu(x, approximate=False)


def mlp(policy: Policy, x: jax.Array, up: Weights, down: Weights) -> jax.Array:
    """down(GELU(up(x))), [..., D]."""
    if policy.form == "cpu":
        return cpu.mlp(policy.compute, x, up, down)
    return dense(policy, gelu(policy, dense(policy, x, *up)), *down)


def residual(policy: Policy, x: jax.Array, branch: jax.Array) -> jax.Array:
    """The residual stream x [..., D] with what a branch adds to it."""
    return cpu.kept_gradient(x + branch) if policy.form == "cpu" else x + branch


def each_example(policy: Policy, f: Callable, *x: Any) -> jax.Array:
    """`f(*x)`, which takes the examples along the leading axis of all of `x` one by one; for use without a gradient."""
    if policy.form == "cpu" and policy.at_once:
        return cpu.in_groups(f, policy.at_once, x)
    return f(*x)


def mean_over_examples(
    policy: Policy, f: Callable, params: Any, x: Any, given: Any, weight: jax.Array | None
) -> jax.Array:
    """The mean of `f(params, x, given)`, an array that has each example's values along its leading axis.

    Args:
      x, given: examples along the leading axis. Gradients are of `params` and `x` only.
      weight: 0 or 1 (or bool) for each value, of the values' shape; None: all count.
    """
    given = lax.stop_gradient(given)

    def total(params, x, given_and_weight):
        given, weight = given_and_weight
        return f(params, x, given).sum(where=weight)

    if policy.form == "cpu" and policy.at_once:
        error = cpu.sum_in_groups(total, policy.at_once, params, x, (given, weight))
    else:
        error = total(params, x, (given, weight))
    count = (
        jax.eval_shape(f, params, x, given).size if weight is None else jnp.maximum(weight.sum(), 1)
    )
    return error / count


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Options for the jit of a training step on the mesh's devices."""
    return cpu.COMPILER_OPTIONS if mesh.devices.flat[0].platform == "cpu" else None


def _precision(policy: Policy) -> str:
    return "highest" if policy.compute == "float32" else "default"


def _seen(N: int, M: int, lengths_B: jax.Array | None, causal: bool) -> jax.Array | None:
    """Which keys are seen: [B, M] for all queries, or [B or 1, N, M]. None: all."""
    keys_1M = jnp.arange(M)[None]
    past_1NM = (keys_1M <= jnp.arange(N)[:, None])[None] if causal else None
    if lengths_B is None:
        return past_1NM
    within_BM = keys_1M < lengths_B[:, None]
    return within_BM if past_1NM is None else within_BM[:, None] & past_1NM
