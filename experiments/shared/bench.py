"""What the benches share: a contender in a process of its own, so that none inherits another's threads, allocator or caches,
and the row at the end."""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THREADS = 2  # of each contender


@dataclass(frozen=True)
class Bench:
    """Contenders on this machine's CPU, each in a process of its own; they take turns, and their medians are a row.

    Attributes:
      module, doc: of the program.  job, results: of the row.  modes: the contenders' names.
      measure: (mode, arguments) -> {"seconds": of each step}, and maybe "limit": the most items a second that the machine
        allows, and "facts": further metrics of the contender by name.
      unit: what an item is, such as "images".  items: of a step.  peers: how the peers' names begin.
      share: name of the metric "part of the limit".  steps: default of --steps, and its help.
      official: help of --official, for a bench that has it.  arg: the row's argument, from the arguments.
    """

    module: str
    doc: str | None
    job: str
    results: Path
    modes: Sequence[str]
    measure: Callable[[str, argparse.Namespace], dict[str, Any]]
    unit: str
    items: int
    peers: str
    share: str
    steps: tuple[int, str]
    official: str = ""
    arg: Callable[[argparse.Namespace], str] = lambda args: ""

    def main(self, argv: Sequence[str] | None = None) -> int:
        """The command."""
        parser = argparse.ArgumentParser(
            prog=f"python -m {self.module}",
            description=self.doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        modes = ",".join(self.modes)
        parser.add_argument("--modes", default=modes, help="contenders, by comma (%(default)s)")
        parser.add_argument("--rounds", type=int, default=3, help="turns each contender gets")
        parser.add_argument("--steps", type=int, default=self.steps[0], help=self.steps[1])
        parser.add_argument("--official", default="", help=self.official or argparse.SUPPRESS)
        name = self.results.name
        parser.add_argument("--write", action="store_true", help=f"append a row to {name}")
        parser.add_argument("--worker", help=argparse.SUPPRESS)
        args = parser.parse_args(argv)
        if args.worker:
            print("RESULT " + json.dumps(self.measure(args.worker, args)))
            return 0
        chosen = args.modes.split(",")
        if unknown := set(chosen) - set(self.modes):
            parser.error(f"--modes={args.modes}: {unknown} unknown; known: {', '.join(self.modes)}")
        found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in chosen}
        options = f"--steps={args.steps}", f"--official={args.official}"
        for turn in range(args.rounds):
            for mode in chosen:
                print(f"round {turn + 1}/{args.rounds}: {mode} ...", file=sys.stderr, flush=True)
                found[mode].append(run_worker(self.module, mode, *options, threads=THREADS))
        seconds = {m: [s for turn in turns for s in turn["seconds"]] for m, turns in found.items()}
        metrics = self._report(found, seconds)
        if args.write:
            steps, arg = args.steps * args.rounds, self.arg(args)
            write_row(self.results, self.job, metrics, seconds, steps=steps, arg=arg)
        return 0

    def _report(
        self, found: Mapping[str, Sequence[dict[str, Any]]], seconds: Mapping[str, Sequence[float]]
    ) -> dict[str, float]:
        """Prints a line for each contender, the fastest first; the row's metrics."""
        rate = {mode: self.items / statistics.median(times) for mode, times in seconds.items()}
        best = max((r for mode, r in rate.items() if mode.startswith(self.peers)), default=0.0)
        metrics = {"load": os.getloadavg()[0]}
        print(f"\n{self.unit}/s, medians, {THREADS} threads, load {metrics['load']:.1f} at the end")
        for mode, r in sorted(rate.items(), key=lambda item: -item[1]):
            metrics[f"{self.unit}_per_second_{mode}"] = r
            line = f"  {mode:22s} {r:8.1f}   (fastest {self.items / min(seconds[mode]):8.1f})"
            if best and not mode.startswith(self.peers):
                metrics[f"ratio_{mode}"] = r / best
                line += f"  {r / best:6.2f} x the peers' best"
            facts = [turn.get("facts", {}) for turn in found[mode]]
            for name in facts[0]:
                metrics[f"{name}_{mode}"] = statistics.median(turn[name] for turn in facts)
            if "limit" in found[mode][0]:
                limit = statistics.median(turn["limit"] for turn in found[mode])
                metrics[f"{self.share}_{mode}"] = r / limit
                line += f"  {100 * r / limit:4.0f} % of the limit {limit:.1f}"
            print(line)
        return metrics


def timed(run: Callable[[], Any], steps: int, warm: int) -> list[float]:
    """Seconds of each of `steps` calls, after `warm` others: the first ones of a process still fault in new pages."""
    times = []
    for _ in range(warm + steps):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times[warm:]


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
