"""What the benches share: a contender in a process of its own, so that none inherits another's threads, allocator or caches,
and the row at the end."""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def chosen(parser: argparse.ArgumentParser, modes: str, known: Iterable[str]) -> list[str]:
    """The contenders of --modes, by comma; the parser's error where one is unknown."""
    names = modes.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"--modes={modes}: {unknown} unknown; known: {', '.join(known)}")
    return names


def turns(modes: Sequence[str], rounds: int) -> Iterator[str]:
    """Every contender in each round, with a line on stderr."""
    for turn in range(rounds):
        for mode in modes:
            print(f"round {turn + 1}/{rounds}: {mode} ...", file=sys.stderr, flush=True)
            yield mode


def run_worker(module: str, mode: str, *arguments: str, threads: int) -> dict[str, Any]:
    """What `python -m module --worker mode arguments` prints after "RESULT ". Raises RuntimeError with its output."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module, "--worker", mode, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{mode} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def in_turns(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm: int = 3,
    most_seconds: float = math.inf,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and CPU seconds of every run, one of each a round, forwards and backwards, so that what else the machine does
    hits all of them. After `most_seconds` and at least two rounds, no further one begins."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + most_seconds
    for i in range(warm + rounds):
        if i > warm + 1 and time.perf_counter() > end:
            break
        for name in runs if i % 2 else reversed(list(runs)):
            began, used = time.perf_counter(), time.process_time()
            runs[name]()
            if i >= warm:
                seconds[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - used)
    return seconds, cpu


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
