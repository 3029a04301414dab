"""The chips of a TPU pod, or of nodes with NVIDIA GPUs, as devices to compile for where there is none of them."""

import importlib.metadata
import importlib.util
import os
import re
from typing import Any

from common.config import ConfigError

KINDS = {
    "v4": "TPU v4",
    "v5e": "TPU v5e",
    "v5p": "TPU v5",
    "v6e": "TPU v6",
    "h100": "H100",
}  # as JAX calls them
# Per chip: TPUs as Google documents them, GPUs as CUDA reports them.
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "h100": 79.1}
# A v4 chip's two cores are one device, as on a real pod; libtpu's default for this topology alone is a device each.
CHIP_CONFIG = {"v4": {"chip_config_name": "megacore"}}
# No GPU is there to time a product's candidates on, and without times Triton's may not compile: cuBLAS multiplies.
COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
    "h100": {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}
}
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
CUDNN = (9, 10, 0)
# What XLA asks of a GPU (its GpuTargetConfigProto, as text): from NVIDIA's data sheet of the H100 SXM, and from what the
# CUDA programming guide says of compute capability 9.0.
H100 = f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def topology_chips(topology: str) -> tuple[str, list[Any]]:
    """The kind of chip, such as "v5e", and one device for each chip of a topology such as "v5e:16x16" or "h100:8".

    Raises:
      ConfigError: there is no such topology, or what compiles for it is not installed.
    """
    chip, _, grid = topology.partition(":")
    if chip not in HBM_GIB:
        raise ConfigError(
            f"--topology={topology}: chip {chip!r} is unknown; known: {', '.join(HBM_GIB)}"
        )
    try:
        compiler(chip)
        return chip, _gpus(grid) if chip == "h100" else _tpus(topology, chip, grid)
    except ConfigError as error:
        raise ConfigError(f"--topology={topology}: {error}") from error


def compiler(chip: str) -> str:
    """What compiles for a kind of chip, and its version, such as "libtpu 0.0.42.1".

    Raises:
      ConfigError: it is not installed.
    """
    names = PLUGINS if chip == "h100" else ("libtpu",)
    for name in filter(importlib.util.find_spec, names):
        return f"{name} {importlib.metadata.version(name)}"
    raise ConfigError(
        f"preflight compiles for it with {names[0]}, which is not installed here: `make preflight` makes an environment "
        "that has it (.venv-tpu/bin/python -m experiments.preflight ...), or pip install '.[preflight]'"
    )


def _tpus(topology: str, chip: str, grid: str) -> list[Any]:
    from jax.experimental import topologies

    options: dict[str, Any] = dict(CHIP_CONFIG.get(chip, {}))
    if set(grid) <= set("1x"):  # libtpu takes a host to have four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    _tell_libtpu_its_machine()
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return list(described.devices)


def _gpus(grid: str) -> list[Any]:
    """Devices of one node ("8"), or of several nodes with as many each ("4x8")."""
    from jax._src.cudnn import fused_attention_stablehlo
    from jax.experimental import topologies

    if not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", grid):
        raise ConfigError(
            "a number of GPUs is due, such as h100:8, or nodes x GPUs, such as h100:4x8"
        )
    # While it traces, JAX asks this machine's cuDNN for its version. The program is for the other machine's; compiling needs
    # none.
    version = 10000 * CUDNN[0] + 100 * CUDNN[1] + CUDNN[2]
    fused_attention_stablehlo.check_cudnn_version = lambda: version
    nodes, _, each = grid.rpartition("x")
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology=f"1x{nodes or 1}x{each}", target_config=H100
    )
    return list(described.devices)


def _tell_libtpu_its_machine() -> None:
    """libtpu asks, and prints errors where nothing answers; the topology alone says what is compiled for."""
    machine = {"ACCELERATOR_TYPE": "v5litepod-8", "WORKER_HOSTNAMES": "localhost", "WORKER_ID": "0"}
    for name, value in machine.items():
        os.environ.setdefault(f"TPU_{name}", value)
