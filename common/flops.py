"""Counting floating point operations, and how near the chip's peak a step comes.

One multiply-add is two FLOPs, as in every published peak and in the PaLM paper's definition of
model FLOPs utilisation (Chowdhery et al., 2022, appendix B).
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Dense bf16 FLOP/s of one chip, keyed by a part of `device.device_kind`; the first match wins. TPU:
# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. GPU: NVIDIA's data sheets, whose headline numbers with
# 2:4 sparsity are twice these.
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p reports itself as "TPU v5" or "TPU v5p"
    "TPU v6": 918e12,  # v6e reports itself as "TPU v6 lite" or "TPU v6e"
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def traced_flops(fn: Callable[..., Any], *args: Any) -> float:
    """FLOPs of the matrix products and convolutions in `fn(*args)`, loops counted in full.

    Traces only; `args` may be `jax.ShapeDtypeStruct`s. The count is over all devices. Elementwise
    work is left out, as is usual for model FLOPs. `cond` counts its most expensive branch, a Pallas
    kernel its body at every point of its grid. Raises ValueError at a `while` loop that multiplies
    matrices: its trip count is not in the program.
    """
    return jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def jaxpr_flops(jaxpr: Any) -> float:
    """`traced_flops` of a function that is traced already."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            lhs_contracting = params["dimension_numbers"][0][0]
            depth = np.prod([eqn.invars[0].aval.shape[i] for i in lhs_contracting])
            total += 2 * eqn.outvars[0].aval.size * depth
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            out_channels = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * kernel.size / out_channels
        elif name.startswith("dot_product_attention_"):  # cuDNN's, whose scores are computed twice
            query, key = eqn.invars[0].aval, eqn.invars[1].aval
            products = 4 if "bwd" in name else 2
            total += products * 2 * query.size * key.shape[1]
        else:
            inner = [jaxpr_flops(j) for j in _jaxprs_in(params)]
            if name == "while" and sum(inner) > 0:
                raise ValueError(
                    "cannot count a while loop that multiplies matrices: its trip count is not in "
                    "the program. Use lax.scan, or fori_loop with a static length."
                )
            once = max(inner, default=0.0) if name == "cond" else sum(inner)
            total += once * _repeats(name, params)
    return float(total)


def _repeats(primitive: str, params: dict[str, Any]) -> float:
    if primitive == "scan":
        return params["length"]
    if primitive == "shard_map":  # its body sees one device's block
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if primitive == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _jaxprs_in(params: dict[str, Any]) -> list[Any]:
    leaves = [x for p in params.values() for x in (p if isinstance(p, (tuple, list)) else (p,))]
    closed = [getattr(x, "jaxpr", x) for x in leaves]
    return [x for x in closed if hasattr(x, "eqns")]


def peak_flops(device: jax.Device) -> float | None:  # pyright: ignore[reportInvalidTypeForm]  # jax has it as a variable
    """The chip's dense bf16 peak in FLOP/s, or None where the table lacks it (every CPU)."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if kind in device.device_kind), None)


def utilisation(jaxpr: Any, devices: Sequence[Any], seconds: float) -> dict[str, float]:
    """{"mfu": the part of the chips' peak that a step used in `seconds`}; {} where the peak or the FLOPs are not known.

    {"hfu": ...} where activations are computed twice (`jax.checkpoint`): these FLOPs are in the count.
    """
    if (peak := peak_flops(devices[0])) is None:
        return {}
    try:
        used = jaxpr_flops(jaxpr) / (seconds * peak * len(devices))
    except ValueError:  # a loop without a length
        return {}
    return {"hfu" if _recomputes(jaxpr) else "mfu": used}


def _recomputes(jaxpr: Any) -> bool:
    """Whether there is the backward pass of a `jax.checkpoint` in it."""
    return any(
        eqn.params.get("differentiated") or any(map(_recomputes, _jaxprs_in(eqn.params)))
        for eqn in jaxpr.eqns
    )


def measure_matmul_peak(size: int = 2048, repeats: int = 5) -> float:
    """Best FLOP/s of a bf16 x bf16 -> float32 product on the default device: a peak for CPUs."""
    a = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
