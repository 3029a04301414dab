"""The registry of jobs: a config's `job` names one, a function of a Run -> exit code."""

import pkgutil
from collections.abc import Callable

from common.checkpoint import DamagedError, StructureError
from common.config import ConfigError
from common.full_disk import NoSpaceError
from common.images import ImageError
from common.workdir import WorkdirError
from experiments.run import Run

# By name, so that a run loads its own package and no other.
JOBS = {
    "jepa_pretrain": "experiments.jepa_pretrain:run",
    "jepa_baselines": "experiments.jepa_baselines:run",
    "metaopt_grid": "experiments.metaopt_job:run",
    "metaopt_table1": "experiments.metaopt_table1:run",
    "sinks_perplexity": "experiments.sinks_perplexity:run",
    "sinks_speed": "experiments.sinks_speed:run",
    "sinks_attention_map": "experiments.sinks_attention_map:run",
    "sinks_streameval": "experiments.sinks_tasks:run_streameval",
    "sinks_pretrain": "experiments.sinks_pretrain:run",
    "sinks_qa_stream": "experiments.sinks_tasks:run_qa_stream",
}

# Those that several processes can run as one; each process of another would do all of the work, and write its own rows.
SEVERAL_PROCESSES = frozenset({"jepa_pretrain", "sinks_pretrain"})

# What a user can cause and mend: reported as one line. Anything else is our bug and keeps its traceback.
KNOWN_ERRORS = (ConfigError, StructureError, DamagedError, WorkdirError, NoSpaceError, ImageError)


def find(name: str) -> Callable[[Run], int]:
    """The job of this name, its module imported. Raises ConfigError naming those there are."""
    if name not in JOBS:
        raise ConfigError(f"config.job={name!r} is unknown; known jobs: {', '.join(JOBS)}")
    return pkgutil.resolve_name(JOBS[name])


def check_processes(name: str, processes: int) -> None:
    """Raises ConfigError unless the job of this name can run as so many processes."""
    if processes > 1 and name not in SEVERAL_PROCESSES:
        raise ConfigError(
            f"config.job={name!r} runs as one process, but this run has {processes}: start it once, on one host, without "
            f"--num_processes (several processes: {', '.join(sorted(SEVERAL_PROCESSES))})"
        )
