"""Evaluations of a run: one that fails is reported in a line and in the rows of the run, and does not stop the training."""

import logging
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from common.distributed import exchange
from common.recipe import EvalFn
from common.writers import read_metrics

log = logging.getLogger("triptych")


class EvaluationFailed(RuntimeError):
    """All training is done and saved, but an evaluation after it failed. A restart repeats that alone."""


def run_evals(
    evals: Mapping[str, EvalFn], state: Any, step: int, workdir: Path
) -> tuple[dict[str, float], dict[str, str]]:
    """Runs each and returns (row, what went wrong by name).

    The row holds "<name>/<value>" of those that went well, and "<name>_failed" = 1 for the others.
    With several processes, one that fails on any of them has failed.

    Raises:
      Exception: what went wrong, where the other processes do not come to the same point within ten
        minutes: they wait in the middle of the evaluation for this one, and only its end frees them.
    """
    row, failed = {}, {}
    for name, fn in evals.items():
        values, problem, error = {}, "", None
        try:
            values = {f"{name}/{key}": float(value) for key, value in fn(state)}
        except Exception as caught:  # a user's evaluation may raise anything
            error = caught
            problem = describe(error, f"evaluation {name!r} at step {step}", workdir)
        try:
            problems = exchange(f"evaluation {name}", problem)
        except jax.errors.JaxRuntimeError as late:
            raise (error or late) from None
        if problem := next(filter(None, problems), ""):
            failed[name] = problem
            row[f"{name}_failed"] = 1.0
        else:
            row |= values
    return row, failed


def unrecorded(evals: Collection[str], workdir: Path, step: int) -> list[str]:
    """The evaluations without values at `step` in `workdir`/metrics.jsonl; the same on all processes."""
    path, names = workdir / "metrics.jsonl", list(evals)
    if names and jax.process_index() == 0 and path.exists():
        seen = [key for row in read_metrics(path) if row["step"] == step for key in row]
        names = [n for n in names if not any(key.startswith(f"{n}/") for key in seen)]
    return exchange("evaluations left", "\n".join(names))[0].splitlines()


def describe(error: Exception, what: str, workdir: Path) -> str:
    """One line: the error's kind and first line. Its traceback goes to `workdir`/evaluation_errors.txt."""
    text = (str(error).strip() or "no message").splitlines()[0][:300]
    path = workdir / "evaluation_errors.txt"
    if jax.process_index():
        path = path.with_stem(f"{path.stem}_{jax.process_index()}")
    try:
        with open(path, "a") as file:
            file.write(f"{what}\n{''.join(traceback.format_exception(error))}\n")
    except OSError:  # a full disk must not hide the failure
        return f"{type(error).__name__}: {text}"
    return f"{type(error).__name__}: {text} (traceback in {path})"
