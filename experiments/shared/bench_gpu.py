"""What the GPU benches share: cells, measured one after the other while time is left, each a row as soon as it is done.

A cell names its contenders, ours and peers; they take turns in one process, so that what else the machine does hits all of
them, and the row has each one's median and quartiles. What has a row of this hardware in the out file is not measured
again: start the same command until nothing is left. A contender that fails, or whose library lacks, is named in the row.

Nothing is downloaded: weights are random, of the named sizes. Every part measures the machine's own ceilings first, which
the shares of a bound refer to, and again at its end.
"""

import argparse
import gc
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax
import jax.numpy as jnp
import numpy as np

from common.results import append_row, environment, make_row, read_rows
from experiments.shared.bench import in_turns

RESULTS = Path(__file__).parents[1] / "results"
PEERS = ("torch", "triton", "transformers")
MOST_SECONDS = 30.0  # of a cell's turns, compilation aside


@dataclass
class Contender:
    """Something to time.

    Attributes:
      run: one timed call, which ends when the device is done.  steps: of the call, such as tokens or updates.
      items: of a step, such as images or rows.  flops, nbytes: that a step cannot do without, for its bound.
      facts: what else the row tells of it, such as bytes of memory.
    """

    run: Callable[[], Any]
    steps: int = 1
    items: float = 1.0
    flops: float = 0.0
    nbytes: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A row: its name, its estimate in seconds on an H200 (compilation included), and what makes each contender."""

    name: str
    estimate: float
    contenders: Mapping[str, Callable[[], Contender]]
    repeats: int = 20


def compiled(fn: Callable, *arguments: Any, donate: Sequence[int] = ()) -> tuple[Any, dict]:
    """(`fn` compiled for `arguments`, {"compile_seconds", "peak_bytes"}); peak_bytes is the program's own need."""
    began = time.perf_counter()
    done = jax.jit(fn, donate_argnums=donate).lower(*arguments).compile()
    facts = {"compile_seconds": time.perf_counter() - began}
    if (m := done.memory_analysis()) is not None:
        held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        facts["peak_bytes"] = float(held + m.temp_size_in_bytes)
    return done, facts


def repeated(step: Callable, state: Any) -> Callable[[], None]:
    """A run of `step(state) -> (state, anything)`, whose state goes from call to call and may be donated."""
    held = [state]

    def run() -> None:
        held[0] = jax.block_until_ready(step(held[0]))[0]

    return run


def checked(here: Callable, there: Callable, tolerance: float, *arguments: Any) -> Contender:
    """`here` on the default device, with the error of its numbers against those of `there` on the CPU, both with float32
    products as they are written. Raises ValueError where that is above `tolerance`: what is timed must be right."""
    cpu = jax.devices("cpu")[0]
    with jax.default_matmul_precision("highest"):
        with jax.default_device(cpu):
            want = jax.device_get(jax.jit(there)(*jax.device_put(arguments, cpu)))
        step, facts = compiled(here, *arguments)
        got = jax.device_get(step(*arguments))
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))  # noqa: E731
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    error = max(norm(np.asarray(a, np.float64) - b) / norm(b) for a, b in pairs)
    if not error < tolerance:
        raise ValueError(
            f"an error of {error:.1e} against the CPU's numbers, above {tolerance:.0e}"
        )
    return Contender(
        lambda: jax.block_until_ready(step(*arguments)), facts=facts | {"error": error}
    )


def largest(make: Callable[[int], Contender], batch: int) -> Contender:
    """What `make` gives for the largest of `batch`, half of it, a quarter, ... that memory holds; it is in the facts."""
    while True:
        try:
            contender = make(batch)
            contender.run()
        except Exception as error:
            text = str(error).lower()
            if batch < 2 or not ("resource_exhausted" in text or "out of memory" in text):
                raise
            batch //= 2
        else:
            contender.facts["batch"] = float(batch)
            return contender


def torch_device() -> Any:
    import torch  # pyright: ignore[reportMissingImports]  # extra: peers

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def torch_contender(step: Callable[[], Any], **counts: Any) -> Contender:
    """A peer's: `step` and the wait for the device, with its peak of memory, which one call before the turns tells."""
    import torch  # pyright: ignore[reportMissingImports]  # extra: peers

    cuda = torch.cuda.is_available()

    def run() -> None:
        step()
        if cuda:
            torch.cuda.synchronize()

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run()
    facts = {"compile_seconds": time.perf_counter() - began}
    if cuda:
        facts["peak_bytes"] = float(torch.cuda.max_memory_allocated())
    return Contender(run, facts=facts, **counts)


def ceilings(smoke: bool) -> Cell:
    """A large product, a large copy, an empty launch, and 100 tiny kernels in one program; of random data, not zeros."""
    n, size = (64, 2**12) if smoke else (8192, 2**30)

    def product() -> Contender:
        a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
        step, facts = compiled(lambda a: jnp.dot(a, a, preferred_element_type=jnp.bfloat16), a)
        return Contender(lambda: jax.block_until_ready(step(a)), flops=2 * n**3, facts=facts)

    def copy() -> Contender:
        x = jax.random.uniform(jax.random.key(0), (size,), jnp.float32)
        step, facts = compiled(lambda x: x + 1, x)
        return Contender(lambda: jax.block_until_ready(step(x)), nbytes=8 * size, facts=facts)

    def tiny(count: int) -> Contender:
        def chain(x):
            for _ in range(count):
                x = jax.lax.optimization_barrier(x + 1)
            return x

        step, facts = compiled(chain, x := jnp.zeros(()))
        calls = 100 // count
        run = lambda: jax.block_until_ready([step(x) for _ in range(calls)])  # noqa: E731
        return Contender(run, steps=100, facts=facts)

    names = {
        "matmul": product,
        "copy": copy,
        "launch": partial(tiny, 1),
        "graph": partial(tiny, 100),
    }
    return Cell("ceilings", 20, names)


def run_part(
    job: str, cells: Callable[[bool], Sequence[Cell]], argv: Sequence[str] | None = None
) -> int:
    """The command of one part: measures the cells in their order, best first, and appends a row for each.

    Args:
      job: the part's name, "bench_gpu_<paper>".  cells: from whether it is a smoke test to the cells.
    """
    paper = job.removeprefix("bench_gpu_")
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{paper}.bench_gpu")
    out = RESULTS / paper / "bench_gpu.jsonl"
    parser.add_argument("--out", type=Path, default=out, help="rows go here (%(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit (%(default)s)")
    parser.add_argument("--only", default="", help="cells whose names begin so")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a CPU")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    if not args.smoke and jax.default_backend() == "cpu":
        parser.error("there is no GPU here: give --smoke")
    here = environment()["hardware"], args.smoke
    rows = [(row, (row.hardware, row.overrides.get("smoke"))) for row in read_rows(args.out)]
    done = {row.arg for row, where in rows if where == here}
    first, last = ceilings(args.smoke), ceilings(args.smoke)
    todo = [c for c in cells(args.smoke) if c.name.startswith(args.only) and c.name not in done]
    if not todo:
        print(
            f"{args.out} has a row of every cell of this machine: remove a row to measure it again"
        )
    reached: dict[str, float] = {}
    for number, cell in enumerate([first, *todo, last] if todo else []):
        left = end - time.monotonic()
        if left < cell.estimate + (last.estimate if cell is not last else 0):
            print(f"{cell.name}: left out, {cell.estimate:.0f} s and {left:.0f} s left", flush=True)
            continue
        name = cell.name if cell in todo else f"{cell.name} {'start' if number == 0 else 'end'}"
        metrics = _measured(job, cell, name, args, reached)
        if cell is first:
            names = ("matmul", "flops_per_second"), ("copy", "bytes_per_second")
            reached = {rate: metrics.get(f"{name}_{rate}", 0.0) for name, rate in names}
    return 0


def _measured(
    job: str, cell: Cell, name: str, args: argparse.Namespace, reached: Mapping[str, float]
) -> dict[str, float]:
    """Measures a cell, writes its row unless nothing of it ran, and returns its metrics."""
    began, metrics, ready, failed = time.perf_counter(), {}, {}, {}
    for contender, make in cell.contenders.items():
        try:
            ready[contender] = make()
            ready[contender].run()
        except Exception as error:  # any: the others go on
            ready.pop(contender, None)
            failed[contender] = f"{type(error).__name__}: {error}"[:300]
    runs, rounds = {k: c.run for k, c in ready.items()}, 2 if args.smoke else cell.repeats
    seconds, _ = in_turns(runs, rounds, warm=2, most_seconds=MOST_SECONDS)
    clocks = _clocks()
    for k, c in ready.items():
        low, middle, high = (s / c.steps for s in statistics.quantiles(seconds[k], n=4))
        metrics |= {f"{k}_ms": 1e3 * middle, f"{k}_ms_low": 1e3 * low, f"{k}_ms_high": 1e3 * high}
        metrics |= {f"{k}_per_second": c.items / middle, f"{k}_n": len(seconds[k])}
        metrics |= {f"{k}_{fact}": value for fact, value in c.facts.items()}
        metrics |= {f"{k}_flops_per_second": c.flops / middle} if c.flops else {}
        metrics |= {f"{k}_bytes_per_second": c.nbytes / middle} if c.nbytes else {}
        counts = (c.flops, "flops_per_second"), (c.nbytes, "bytes_per_second")
        if bound := max(
            count / reached[rate] if reached.get(rate) else 0 for count, rate in counts
        ):
            metrics[f"{k}_share_of_bound"] = bound / middle
        print(f"{name}: {k} {1e3 * middle:.3f} ms, {c.items / middle:,.0f}/s", flush=True)
    for k, why in failed.items():
        print(f"{name}: {k} failed: {why}", flush=True)
    if ready:
        told = {"failed": failed, "smoke": args.smoke, **_told(), **clocks}
        row = make_row(job=job, config=job, arg=name, overrides=told, metrics=metrics, seeds=[0],
                       steps=cell.repeats, wall_seconds=time.perf_counter() - began)  # fmt: skip
        append_row(args.out, row)
    ready.clear()
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()
    return metrics


def _told() -> dict[str, str]:
    """What decides speed besides the code: flags, and the peers' versions."""
    told = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    for package in PEERS:
        try:
            told[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return told


def _clocks() -> dict[str, str]:
    """The first GPU's driver, SM clock in MHz, power in W and temperature, as they are right after the turns."""
    names = ("driver_version", "clocks.sm", "power.draw", "temperature.gpu")
    query = [
        "nvidia-smi",
        "-i",
        "0",
        f"--query-gpu={','.join(names)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, map(str.strip, found.stdout.split(","))))
