"""The registry of jobs: a config's `job` names one, a function of (settings, workdir) -> exit code."""

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.checkpoint import DamagedError, StructureError
from common.config import ConfigError
from common.images import ImageError

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

# What a user can cause and mend: reported as one line. Anything else is our bug and keeps its traceback.
KNOWN_ERRORS = (ConfigError, StructureError, DamagedError, ImageError)


def find(name: str) -> Callable[[dict[str, Any], Path], int]:
    """The job of this name, its module imported. Raises ConfigError naming those there are."""
    if name not in JOBS:
        raise ConfigError(f"config.job={name!r} is unknown; known jobs: {', '.join(JOBS)}")
    return pkgutil.resolve_name(JOBS[name])
