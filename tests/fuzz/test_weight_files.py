"""Damaged weight files end in one plain error that names them, or in a model that is whole; never in anything else.

`make test` loads some, `make test-fuzz` all: SEEDS times MUTANTS of each format, or other seeds by FUZZ_SEEDS=5,6,7.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SEEDS = [int(seed) for seed in os.environ.get("FUZZ_SEEDS", "0,1,2").split(",")]
MUTANTS, SOME, EACH = 300, 60, 25  # of a seed; of them in `make test`; in one process
ROOT = Path(__file__).resolve().parents[2]
HANG = 900  # seconds for one process: it would have to sleep, since what computes too long is killed by its CPU time


def outcomes(kind: str, seed: int, first: int, stop: int) -> list[dict]:
    """What became of each mutant. Where one takes the process down, it is blamed, and the next process goes on after it."""
    done, env = [], {**os.environ, "PYTHONPATH": str(ROOT)}
    while first < stop:
        last = min(first + EACH, stop)
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.worker",
            kind,
            str(seed),
            str(first),
            str(last),
        ]
        try:
            run = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANG
            )
            lines, ended = (
                run.stdout.splitlines(),
                f"exit code {run.returncode}: {run.stderr[-2000:]}",
            )
        except subprocess.TimeoutExpired as error:
            lines, ended = (error.stdout or b"").decode().splitlines(), "it hangs"
        said = [json.loads(line) for line in lines if line.endswith("}")]
        done += [line for line in said if "outcome" in line]
        if not said:
            raise RuntimeError(f"{' '.join(command)}: {ended}")
        if "outcome" not in said[-1]:
            done.append({**said[-1], "outcome": "", "wrong": f"the process ends: {ended}"})
        first = said[-1]["index"] + 1
    return done


def check(kind: str, seed: int, first: int, stop: int) -> None:
    done = outcomes(kind, seed, first, stop)
    assert [line["index"] for line in done] == list(range(first, stop))
    wrong = [
        f"python -m tests.fuzz.worker {kind} {seed} {line['index']}\n    {line['what']}: {line['wrong']}"
        for line in done
        if line["wrong"]
    ]
    assert not wrong, "replay with\n" + "\n".join(wrong)
    loaded = sum(line["outcome"] == "loaded" for line in done)
    assert (
        0.05 * len(done) < loaded < 0.6 * len(done)
    )  # a loader that refuses all is no good either


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_some_damaged_files(kind):
    check(kind, 0, 0, SOME)


@pytest.mark.fuzz
@pytest.mark.parametrize("first", range(0, MUTANTS, 50))
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_all_damaged_files(kind, seed, first):
    check(kind, seed, first, first + 50)
