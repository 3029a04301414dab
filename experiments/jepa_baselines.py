"""Job "jepa_baselines": what the probes find without any learning, in an untrained encoder and in raw pixels.

  python -m experiments.launch --config=experiments/configs/jepa/cifar10.py --config.job=jepa_baselines --workdir=DIR

Takes any I-JEPA config and appends its rows to DIR/results.jsonl, where the pretraining job of the same config leaves its
own. Skips what has a row.
"""

import logging
import time
from pathlib import Path
from typing import Any

import jax

from common.mesh import auto_mesh
from common.results import append_row, make_row, read_rows
from experiments.jepa_eval import encode_fn, linear_probes, pixels
from experiments.jepa_pretrain import begin

KINDS = {"untrained": "untrained encoder", "pixels": "raw pixels"}
log = logging.getLogger("triptych")


def run(values: dict[str, Any], workdir: Path) -> int:
    """Runs the job; see experiments/launch.py for what it prints and returns."""
    rows = workdir / "results.jsonl"
    done = {row.job.removeprefix("baseline_") for row in read_rows(rows)}
    if done.issuperset(KINDS):
        log.info("%s has the baselines' rows already", rows)
        return 0
    settings, sets, mesh = begin(values, workdir)
    mesh = auto_mesh(mesh)
    seed = settings.train.seed
    for kind, title in KINDS.items():
        if kind in done:
            continue
        began = time.perf_counter()
        encode = pixels
        if kind == "untrained":
            encoder = settings.recipe.encoder
            encode = encode_fn(encoder, encoder.init(jax.random.key(seed)))
        metrics = linear_probes(settings, mesh, encode, sets.bank, sets.test, title)
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            row = make_row(
                job=f"baseline_{kind}",
                config=settings.name,
                metrics=metrics,
                seeds=[seed],
                steps=0,
                wall_seconds=time.perf_counter() - began,
                resolved=values,
            )
            append_row(rows, row)
            log.info("\n".join([title, *(f"  {k:28s} {v:8.4f}" for k, v in metrics.items())]))
    return 0
