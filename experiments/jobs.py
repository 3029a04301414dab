"""The registry of jobs: a config's `job` names one, a function of a Run -> exit code."""

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import jax

from common.checkpoint import DamagedError, StructureError
from common.config import ConfigError
from common.full_disk import NoSpaceError
from common.images import ImageError
from common.workdir import WorkdirError
from experiments.shared.run import Run
from experiments.shared.settings import describe

# By name, so that a run loads its own package and no other.
JOBS = {
    "jepa_pretrain": "experiments.jepa.pretrain:run",
    "jepa_baselines": "experiments.jepa.baselines:run",
    "metaopt_grid": "experiments.metaopt.grid_job:run",
    "metaopt_table1": "experiments.metaopt.table1:run",
    "sinks_perplexity": "experiments.sinks.perplexity:run",
    "sinks_speed": "experiments.sinks.speed:run",
    "sinks_attention_map": "experiments.sinks.attention_map:run",
    "sinks_streameval": "experiments.sinks.tasks:run_streameval",
    "sinks_pretrain": "experiments.sinks.pretrain:run",
    "sinks_qa_stream": "experiments.sinks.tasks:run_qa_stream",
}

# Those that several processes can run as one; each process of another would do all of the work, and write its own rows.
SEVERAL_PROCESSES = frozenset({"jepa_pretrain", "sinks_pretrain"})

# What a user can cause and fix: reported as one line. Anything else is our bug and keeps its traceback.
KNOWN_ERRORS = (ConfigError, StructureError, DamagedError, WorkdirError, NoSpaceError, ImageError)

OUT_OF_MEMORY = (
    "The device has not enough memory: lower the batch (config.train.batch), raise config.train.accumulate, set "
    "config.policy.remat=true, or spread the state over more devices (config.mesh.fsdp); outside training, lower the sizes "
    "of the config's caches and chunks"
)


def explain(error: BaseException) -> tuple[str, int] | None:
    """What to tell of an error that a job ended with, and the exit code; None for one that keeps its traceback."""
    text = str(error)
    first = text.strip().partition("\n")[0].rstrip(".")
    if isinstance(error, KNOWN_ERRORS):
        return text, 1 if isinstance(error, NoSpaceError) else 2
    if out_of_memory(error):
        return f"{first}. {OUT_OF_MEMORY}", 1
    if isinstance(error, NotImplementedError) and "mesh" in text:  # of jax's mesh_utils
        return f"{first}. This mesh does not fit the machine: choose other sizes of config.mesh", 2
    if isinstance(error, RuntimeError) and text.startswith("Unable to initialize backend"):
        reason = first.partition(" (set JAX_PLATFORMS")[0]
        return f"{reason}. Unset JAX_PLATFORMS, or install the extra for that device", 2
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory, or a program needs more than it has."""
    text = str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and (
        "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
    )


def find(name: str) -> Callable[[Run], int]:
    """The job of this name, its module imported. Raises ConfigError naming those there are."""
    if name not in JOBS:
        raise ConfigError(f"config.job={name!r} is unknown; known jobs: {', '.join(JOBS)}")
    return pkgutil.resolve_name(JOBS[name])


def about(values: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Type and one line of every setting of a config's job, by its name; {} for a job that says nothing."""
    known = values.get("job") in JOBS and getattr(find(values["job"]), "settings", None)
    return describe(known) if known else {}


def check_processes(name: str, processes: int) -> None:
    """Raises ConfigError unless the job of this name can run as so many processes."""
    if processes > 1 and name not in SEVERAL_PROCESSES:
        raise ConfigError(
            f"config.job={name!r} runs as one process, but this run has {processes}: start it once, on one host, without "
            f"--num_processes (several processes: {', '.join(sorted(SEVERAL_PROCESSES))})"
        )
