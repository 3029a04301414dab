"""Programs that run as two processes of one job, and what each reports."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "PYTHONFAULTHANDLER": "1",
    # Quick compiles, as in tests/conftest.py, but not as many devices.
    "XLA_FLAGS": re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]),
}

JOIN = """
import json, sys, time
import jax
from common import distributed
jax.config.update("jax_num_cpu_devices", 2)
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
"""

REPORT = """
def report(**found):
    \"\"\"Into a file: the collectives library writes to stdout in pieces.\"\"\"
    with open(sys.argv[3], "w") as file:
        json.dump(found, file)
"""


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def start(program, folder):
    """Starts the program as process 0 and 1 of a job of two, with two devices each; each may `report` once."""
    address = free_address()
    return [
        subprocess.Popen(
            [sys.executable, "-c", JOIN + REPORT + program, address, str(i), folder / f"{i}.json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        for i in range(2)
    ]


def finish(processes, timeout=60):
    """Their outputs, once all have ended; none outlives the test, and those that hang tell where."""
    try:
        return [p.communicate(timeout=timeout) for p in processes]
    except subprocess.TimeoutExpired:
        for p in processes:
            p.send_signal(signal.SIGABRT)
        pytest.fail("\n".join(p.communicate(timeout=60)[1] for p in processes))
    finally:
        for p in processes:
            p.kill()


def reported(folder, i):
    return json.loads((folder / f"{i}.json").read_text())
