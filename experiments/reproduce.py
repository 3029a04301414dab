"""The three papers' effects on the embedded defaults: `make reproduce`.

  metaopt  digits: a fixed learning rate against one that learns itself, over initial rates
  sinks    SmolLM2 reads a novel through a small cache: dense, window, re-computation, sinks
  jepa     pretrains I-JEPA on rendered scenes and probes it next to an untrained encoder and raw pixels

Each part prints its table and leaves a picture and result rows in its folder of the workdir. Interrupted, it continues where
it stood; finished parts are not run again.

  python -m experiments.reproduce [--only=jepa] [--workdir=runs/reproduce] [--seeds=1] [--epochs=N]
"""

import argparse
import contextlib
import logging
import math
import pkgutil
import time
import warnings
from pathlib import Path

from common.cpu_heap import keep_freed_memory
from common.distributed import EXIT_PREEMPTED
from common.paths import check_local
from experiments.shared.stopping import interrupted, leave

# The quickest first: something to look at within a minute. By name, so that none loads before its turn.
PARTS = {
    "metaopt": "experiments.metaopt.reproduce:run",
    "sinks": "experiments.sinks.reproduce:run",
    "jepa": "experiments.jepa.reproduce:run",
}
log = logging.getLogger("triptych")


def main(argv: list[str] | None = None) -> int:
    try:
        return _reproduce(argv)
    except KeyboardInterrupt:
        return interrupted()


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:  # nor NaN
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: give a number above 0")


def _reproduce(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="metaopt,sinks,jepa", help="parts, by comma")
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/reproduce"), help="of tables, rows and pictures"
    )
    parser.add_argument("--seeds", type=int, default=1, help="of I-JEPA, to average (default 1)")
    parser.add_argument(
        "--epochs", type=_positive, default=0, help="of I-JEPA; default: its config's"
    )
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds={args.seeds}: at least 1")
    chosen = [name.strip() for name in args.only.split(",")]
    for name in chosen:
        if name not in PARTS:
            parser.error(f"--only={args.only}: {name!r} is none of {', '.join(PARTS)}")
    try:
        check_local(args.workdir, "--workdir")
    except ValueError as error:
        parser.error(str(error))
    keep_freed_memory()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    from common.workdir import hold  # both load libraries that would set logging up their way
    from experiments.jobs import explain

    options = {"jepa": {"seeds": args.seeds, "epochs": args.epochs}}

    began, failed = time.perf_counter(), []
    for name in (name for name in PARTS if name in chosen):
        log.info("\n=== %s", name)
        try:
            run = pkgutil.resolve_name(PARTS[name])
            with hold(args.workdir / name) as workdir:
                code = run(workdir, **options.get(name, {}))
        except Exception as error:
            if (known := explain(error)) is None:
                raise
            log.error("error: %s", known[0])
            code = known[1]
        if code == EXIT_PREEMPTED:
            log.warning("run `make reproduce` again to continue")
            return code
        if code:
            failed.append(name)
    log.info(
        "done in %.1f minutes; pictures lie in %s", (time.perf_counter() - began) / 60, args.workdir
    )
    if failed:
        log.error("failed: %s", ", ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    leave(main())
