"""Runs one config.

  python -m experiments.launch --config=experiments/jepa/configs/scenes.py --workdir=runs/scenes
  python -m experiments.launch --config=experiments/jepa/configs/cifar10.py:smoke --workdir=/tmp/try
  python -m experiments.launch --config=... --workdir=... --config.optim.lr=3e-4 --config.train.steps=1000

The part after ":" is the config's own argument (`smoke` shrinks any config to a few steps on a laptop);
`--config=PATH.py --help` lists its arguments and settings. `--config.GROUP.NAME=None` unsets one that may be None. Started
again in the same workdir, a run continues exactly from its last checkpoint, and a finished one says so. A start
with other settings is refused; --resume=changed takes them on purpose, and the row then tells what changed at which step. A
workdir serves one run at a time. Exit codes: 0 done, 1 failed (also a full disk, or a final evaluation that failed: the same
command does what is left), 2 a setting or input is wrong, 75 stopped by a signal with its state saved (start it again), 130
by Ctrl-C.

On a pod start the same command on every host; on a cluster without auto-detection add --coordinator, --num_processes and
--process_id. Processes that differ in settings, code, library versions or data stop with exit code 2 before the first step.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from common import distributed
from common.config import ConfigError
from common.cpu_heap import keep_freed_memory
from common.paths import check_local
from experiments.shared import usage
from experiments.shared.old_paths import renewed
from experiments.shared.old_settings import renewed as renewed_settings
from experiments.shared.stopping import interrupted, leave

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: PATH.py or PATH.py:argument,key=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where rows, curves and checkpoints go.")
_RESUME = flags.DEFINE_enum(
    "resume", "same", ["same", "changed"], "Whether a workdir's run may go on with other settings."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0 (auto on TPU, SLURM)."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes in all (auto on TPU, SLURM).")
_PROCESS = flags.DEFINE_integer("process_id", None, "This process's number (auto on TPU, SLURM).")

# What parsing flags and reading a config can raise.
_WRONG_FLAGS = (
    flags.Error,
    ConfigError,
    AttributeError,
    KeyError,
    ValueError,
    OSError,
    SyntaxError,
)


def main(argv: list[str]) -> int:
    """Parses flags, runs the config's job, and turns known failures and Ctrl-C into one plain line and an exit code."""
    try:
        return _launch(renewed(argv))
    except KeyboardInterrupt:
        return interrupted()


def _launch(argv: list[str]) -> int:
    if usage.wanted(argv):
        return _help(argv)
    # Before a config is read: what it imports would set logging up its own way.
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    logging.getLogger("triptych").setLevel(logging.INFO)
    try:
        argv, unset = usage.without_none(argv)
        unused = flags.FLAGS(argv)[1:]
        if _CONFIG.value is None or not _WORKDIR.value:
            print(usage.of_flags(str(__doc__), _CONFIG.name))
            return _fail("both --config and --workdir are needed")
        check_local(_WORKDIR.value, "--workdir")
        config = _settings(unset)
    except _WRONG_FLAGS as error:
        return _fail(_plain(error))
    if unused:
        return _fail(
            f"{' '.join(unused)} is not understood; settings are --config.GROUP.NAME=VALUE"
        )
    where = f"{config.get('job')} {config.get('name', '')} in {_WORKDIR.value}"
    logging.getLogger("triptych").info("%s: loading ...", where)

    # After the flags: a typo should not wait for every library a job needs.
    from common.workdir import hold
    from experiments.jobs import find
    from experiments.shared.run import Run

    joined = False
    try:
        job = find(config.get("job", ""))
        _join_hosts(config)
        joined = True
        with hold(_WORKDIR.value) as workdir:
            return job(Run(config, workdir, resume=_RESUME.value, **_origin(unset)))
    except Exception as error:
        return _end(error, joined)


def _end(error: Exception, joined: bool) -> int:
    """Tells a known failure in one line, and the other processes of the run; any other goes on with its traceback."""
    from experiments.jobs import explain

    known = explain(error)
    if joined:
        distributed.report_failure(known[0] if known else f"{type(error).__name__}: {error}")
    if known is None:
        raise error
    return _fail(*known)


def _help(argv: list[str]) -> int:
    """Prints every flag, and the configs or, with --config, what that one can be told."""
    from experiments.jobs import about

    print(usage.of_flags(str(__doc__), _CONFIG.name))
    try:
        argv, unset = usage.without_none(usage.without_help(argv))
        flags.FLAGS(argv)
        if _CONFIG.value is None:
            print(usage.of_configs())
        else:
            path = config_flags.get_config_filename(flags.FLAGS[_CONFIG.name])
            print(
                usage.of_config(path.partition(":")[0], values := _settings(unset), about(values))
            )
    except _WRONG_FLAGS as error:
        return _fail(_plain(error))
    return 0


def _join_hosts(config: dict[str, Any]) -> None:
    """Joins the processes of a run. Raises ConfigError where they cannot be joined, differ, or there is no device."""
    from experiments.jobs import check_processes
    from experiments.shared.facts import run_facts

    try:
        distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        if jax.process_count() > 1:
            distributed.require_same(run_facts(config) | {"--resume": _RESUME.value})
        check_processes(config["job"], jax.process_count())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except AssertionError as error:  # jax's, where JAX_PLATFORMS names only what is not there
        platforms = os.environ.get("JAX_PLATFORMS")
        raise ConfigError(
            f"jax finds no device of JAX_PLATFORMS={platforms}: unset it, or install the extra for that device"
        ) from error
    except jax.errors.JaxRuntimeError as error:  # of the service that the processes meet at
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the processes of this run cannot be joined: {reason}. Start the same command on every host, at about the "
            f"same time, with --coordinator={_COORDINATOR.value or 'HOST:PORT'} naming a free port of process 0"
        ) from error


def _settings(unset: Sequence[str]) -> dict[str, Any]:
    """The config as the command line has it, with None for the settings of these names."""
    _CONFIG.value.update_from_flattened_dict(dict.fromkeys(unset))
    return renewed_settings(_CONFIG.value.to_dict(), tell=True)


def _origin(unset: Sequence[str]) -> dict[str, Any]:
    """Where the settings come from: the config's file, its argument, and what the command line changed."""
    flag = flags.FLAGS["config"]
    path, _, arg = config_flags.get_config_filename(flag).partition(":")
    changed = config_flags.get_override_values(flag).items()
    overrides = {k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in changed}
    return {"config": path, "arg": arg, "overrides": overrides | dict.fromkeys(unset)}


def _plain(error: BaseException) -> str:
    """An error's own words: ml_collections and absl wrap them in reprs and tracebacks."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    if ours := [e for e in chain if isinstance(e, ConfigError)]:
        return str(ours[-1])
    if wrong := [str(e.args[0]) for e in chain if isinstance(e, KeyError)]:
        return "no such setting: " + wrong[0].replace("\n", ". ")
    if isinstance(error, SyntaxError):
        return f"cannot read the config: {error.filename}, line {error.lineno}: {error.msg}"
    if isinstance(error, OSError):
        return (
            f"cannot read the config: {str(error).splitlines()[-1].strip()}; give --config=PATH.py"
        )
    return str(error)


def _fail(error: object, code: int = 2) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    keep_freed_memory()
    leave(main(sys.argv))
