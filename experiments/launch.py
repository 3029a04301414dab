"""Runs one config.

  python -m experiments.launch --config=experiments/configs/jepa/scenes.py --workdir=runs/scenes
  python -m experiments.launch --config=experiments/configs/jepa/cifar10.py:smoke --workdir=/tmp/try
  python -m experiments.launch --config=... --workdir=... --config.optim.lr=3e-4 --config.train.steps=1000

The part after ":" is the config's own argument (`smoke` shrinks any config to a few steps on a laptop). Started again in
the same workdir, a run continues exactly where its last checkpoint stands. Exit codes: 0 done, 1 failed, 2 a setting or
input is wrong, 75 stopped by a signal with its state saved (start it again).

On a pod start the same command on every host; on a cluster without auto-detection add --coordinator, --num_processes and
--process_id.
"""

import logging
import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from common import distributed
from common.config import ConfigError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: PATH.py or PATH.py:argument,key=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where rows, curves and checkpoints go.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0 (auto on TPU, SLURM)."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes in all (auto on TPU, SLURM).")
_PROCESS = flags.DEFINE_integer("process_id", None, "This process's number (auto on TPU, SLURM).")


def main(argv: list[str]) -> int:
    """Parses flags, runs the config's job, and turns known failures into one plain line and an exit code."""
    try:
        flags.FLAGS(argv)
    except (flags.Error, ConfigError, AttributeError, KeyError, ValueError, OSError) as error:
        return _fail(2, error)
    if _CONFIG.value is None or _WORKDIR.value is None:
        print(__doc__)
        return _fail(2, "both --config and --workdir are needed")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("triptych").setLevel(logging.INFO)

    from experiments.jobs import (
        JOBS,
        KNOWN_ERRORS,
    )  # after the flags: a typo should not wait for jax

    config = _CONFIG.value
    job = JOBS.get(config.job)
    if job is None:
        return _fail(2, f"config.job={config.job!r} is unknown; known jobs: {', '.join(JOBS)}")
    try:
        distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        return job(config.to_dict(), Path(_WORKDIR.value))
    except KNOWN_ERRORS as error:
        return _fail(2, error)


def _fail(code: int, error) -> int:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"error: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main(sys.argv))
