"""Eight CPU devices for every test, and quick compiles: XLA's expensive passes would take most of the time. Arrays of
different ranks are never broadcast without a word."""

import importlib.metadata
import os

import pytest

JAXLIB = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        # Their passes are half of the compile time of a training step. A jaxlib that does not know a flag ends the process.
        *(["--xla_cpu_use_fusion_emitters=false"] if JAXLIB < (0, 11) else []),
    ]
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    import jax  # after the flags above

    # What is compared with a peer is written as the peer writes it.
    allowed = item.get_closest_marker("peers") or item.get_closest_marker("aot")
    with jax.numpy_rank_promotion("allow" if allowed else "raise"):
        return (yield)
