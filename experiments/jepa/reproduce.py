"""I-JEPA on rendered scenes, from nothing to probe: the longest part of `make reproduce`.

Renders the scenes (once), pretrains on them, and probes the result next to an untrained encoder and raw pixels. Prints the
table, draws report.png, and appends rows to seed*/results.jsonl. After an interruption it continues where it was.
"""

import json
import logging
import math
import os
from pathlib import Path

import numpy as np

from common.data import open_source
from common.datasets.scenes.builder import prepare
from common.results import ResultRow, markdown_table, read_rows
from experiments.jepa import baselines as jepa_baselines
from experiments.jepa import pretrain as jepa_pretrain
from experiments.jepa.configs.scenes import get_config
from experiments.jepa.pictures import report_picture
from experiments.jepa.settings import resolve
from experiments.shared.run import Run

LABELS = ("count", "distance", "shape")
KINDS = {"jepa": "I-JEPA", **jepa_baselines.KINDS}
log = logging.getLogger("triptych")


def run(workdir: Path, *, seeds: int = 1, epochs: float = 0) -> int:
    """Trains and probes `seeds` seeds, and shows them. Returns an exit code.

    Args:
      epochs: of pretraining; 0 takes the config's.
    """
    data_dir = prepare_scenes(workdir)
    for seed in range(seeds):
        code = run_seed(seed, epochs, workdir, data_dir)
        if code:
            return code
    show(workdir, data_dir, seeds)
    return 0


def prepare_scenes(workdir: Path) -> str:
    """Renders the scenes unless they exist; returns the data directory."""
    data_dir = os.environ.get("TFDS_DATA_DIR", "")
    if not data_dir or not os.access(data_dir, os.W_OK) or not (Path(data_dir) / "scenes").exists():
        data_dir = str(workdir.parent / "data")
    prepare(data_dir)
    return data_dir


def run_seed(seed: int, epochs: float, workdir: Path, data_dir: str) -> int:
    """Pretrains and probes one seed, and its two baselines; skips what has a row. Returns an exit code."""
    run = workdir / f"seed{seed}"
    arg = f"seed={seed}" + (f",epochs={epochs}" if epochs else "")
    config = get_config(arg)
    config.data.data_dir = data_dir
    for name, job in (("jepa_pretrain", jepa_pretrain), ("jepa_baselines", jepa_baselines)):
        config.job = name
        code = job.run(Run(config.to_dict(), run, config="scenes", arg=arg, has_flag=False))
        if code:
            return code
    return 0


def latest_rows(workdir: Path, seeds: int) -> list[ResultRow]:
    """The last row of every job, for each of the first `seeds` seeds."""
    paths = [workdir / f"seed{seed}" / "results.jsonl" for seed in range(seeds)]
    return [row for path in paths for row in {row.job: row for row in read_rows(path)}.values()]


def show(workdir: Path, data_dir: str, seeds: int) -> None:
    """Prints and draws what the rows of the seeds say."""
    rows = latest_rows(workdir, seeds)
    test = open_source("scenes", "test", data_dir)
    labels = [test[i] for i in range(len(test))]
    majority = {
        name: float(np.bincount([record[name] for record in labels]).max() / len(labels))
        for name in LABELS
    }
    jobs = {"jepa_pretrain": "jepa", "baseline_untrained": "untrained", "baseline_pixels": "pixels"}
    accuracy: dict[str, dict[str, tuple[float, float]]] = {}
    for job, kind in jobs.items():
        chosen = [row for row in rows if row.job == job]
        for name in LABELS:
            found = [row.metrics[f"linear_{name}"] for row in chosen]
            spread = float(np.std(found, ddof=1)) if len(found) > 1 else math.nan
            accuracy.setdefault(kind, {})[name] = float(np.mean(found)), spread
    lines = [
        (title, *[_percent(*accuracy[kind][name]) for name in LABELS])
        for kind, title in KINDS.items()
    ]
    lines.append(("most frequent class", *[_percent(majority[name]) for name in LABELS]))
    print("Linear probe on 4,000 test scenes (accuracy, %)")
    print(markdown_table(("features", *LABELS), lines))
    picture = workdir / "report.png"
    config = get_config("")
    config.data.data_dir = data_dir
    report_picture(picture, resolve(config.to_dict(), 20_000), test, accuracy, majority, workdir)
    (workdir / "report.json").write_text(
        json.dumps({"accuracy": accuracy, "majority": majority}, indent=2) + "\n"
    )
    log.info("drew %s", picture)


def _percent(mean: float, spread: float = math.nan) -> str:
    return f"{100 * mean:.1f}" + (f" ± {100 * spread:.1f}" if math.isfinite(spread) else "")
