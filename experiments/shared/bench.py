"""What the benches share: a contender in a process of its own, so that none inherits another's threads, allocator or caches,
and the row at the end."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
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


def write_row(
    results: Path,
    job: str,
    metrics: Mapping[str, float],
    seconds: Mapping[str, Sequence[float]],
    *,
    steps: int,
    arg: str = "",
) -> None:
    """Appends a row of `job` to `results`; `seconds` are the times measured, by contender."""
    from common.results import append_row, make_row

    row = make_row(
        job=job,
        config=job,
        arg=arg,
        metrics=metrics,
        seeds=[0],
        steps=steps,
        wall_seconds=sum(map(sum, seconds.values())),
    )
    append_row(results, row)
    print(f"wrote row {row.id}")
