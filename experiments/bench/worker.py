"""A contender in a process of its own, so that none inherits another's threads, allocator or caches."""

import json
import os
import subprocess
import sys
from typing import Any


def run_worker(module: str, mode: str, *arguments: str, threads: int) -> dict[str, Any]:
    """What `python -m module --worker mode arguments` prints after "RESULT ". Raises RuntimeError with its output."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module, "--worker", mode, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{mode} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))
