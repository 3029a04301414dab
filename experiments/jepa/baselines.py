"""Job "jepa_baselines": what the probes find without any learning, in an untrained encoder and in raw pixels.

  python -m experiments.launch --config=experiments/jepa/configs/cifar10.py --config.job=jepa_baselines --workdir=DIR

Takes any I-JEPA config and appends its rows to DIR/results.jsonl, where the pretraining job of the same config leaves its
own. Skips what has a row.
"""

import logging
import time

import jax

from common.mesh import auto_mesh
from common.results import append_row, read_rows
from experiments.jepa.pretrain import open_run
from experiments.jepa.probes import encode_fn, linear_probes, pixels
from experiments.jepa.settings import Settings
from experiments.shared.run import Run, job

BASELINES = "jepa_baselines"
KINDS = {"untrained": "untrained encoder", "pixels": "raw pixels"}
log = logging.getLogger("triptych")


@job(Settings, only=())  # the settings of the pretraining in the same workdir may not change here
def run(run: Run) -> int:
    """Runs the job; see experiments/launch.py for what it prints and returns."""
    rows = run.workdir / "results.jsonl"
    jobs = [f"baseline_{kind}" for kind in KINDS]
    done = {row.job for row in read_rows(rows) if row.job in jobs and run.owns(row, job=BASELINES)}
    if done.issuperset(jobs):
        log.info("done before: the baselines' rows lie in %s", rows)
        return 0
    settings, sets, mesh = open_run(run.values)
    mesh = auto_mesh(mesh)
    run.begin(0)
    seed = settings.train.seed
    for kind, title in KINDS.items():
        if f"baseline_{kind}" in done:
            continue
        began = time.perf_counter()
        encode = pixels
        if kind == "untrained":
            encoder = settings.recipe.encoder
            encode = encode_fn(encoder, encoder.init(jax.random.key(seed)))
        metrics = linear_probes(settings, mesh, encode, sets.bank, sets.test, title)
        row = run.row(
            metrics, job=f"baseline_{kind}", seeds=[seed], steps=0, mesh=dict(mesh.shape),
            dtype=settings.recipe.policy.compute, wall_seconds=time.perf_counter() - began,
        )  # fmt: skip
        if jax.process_index() == 0:
            append_row(rows, row)
            log.info("\n".join([title, *(f"  {k:28s} {v:8.4f}" for k, v in metrics.items())]))
    return 0
