"""I-JEPA."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from common.results import ResultRow, read_rows
from experiments.jepa.baselines import KINDS
from experiments.shared.tables import Section, machine, percent, section


def scenes(results: Path) -> str:
    note = "`make reproduce`: linear probe on 4,000 test scenes, accuracy in %."
    columns = ("count", "distance", "shape")
    rows = read_rows(results / "scenes.jsonl")
    lines = _probed(rows, [f"linear_{name}" for name in columns])
    return section("Scenes", note, ("features", "seed", *columns, "row"), lines)


def cifar10(results: Path) -> str:
    rows = read_rows(results / "cifar10.jsonl")
    if not rows:
        return ""
    columns = ("linear_label/last", "linear_label/last4", "knn_label")
    other = read_rows(results / "cifar10_vicreg0.01.jsonl")
    lines = _probed(rows, columns)
    lines += [(f"{what}, C-JEPA's terms at 0.01", *rest) for what, *rest in _probed(other, columns)]
    with open(Path(__file__).with_name("audit_cifar10.csv")) as file:
        published = ". ".join(
            f"{p['what']}, {p['epochs']} epochs: {p['linear']}"
            + (f" ± {p['spread']}" if p["spread"] else "")
            for p in csv.DictReader(file)
        )
    note = (
        f"ViT-T/4, {rows[0].steps} steps of 512 (60 epochs), {machine(rows[0])}; test accuracy in %, average pooled target "
        f"encoder, images as JPEG. Published by a third party of unconfirmed origin, linear probe: {published}."
    )
    header = ("features", "seed", "linear, last layer", "linear, last 4", "kNN", "row")
    return section("CIFAR-10", note, header, lines)


def speed(results: Path) -> str:
    rows = read_rows(results / "bench_step.jsonl")
    if not rows:
        return ""
    row, prefix = rows[-1], "images_per_second_"
    best = max(v for k, v in row.metrics.items() if k.startswith(prefix + "torch"))
    lines = [
        (k.removeprefix(prefix), f"{v:.1f}", f"{v / best:.2f}")
        for k, v in row.metrics.items()
        if k.startswith(prefix)
    ]
    note = (
        "Train step of 192 x 12, patch 4, batch 128 on 32x32, images a second, and as a ratio to torch's best "
        f"({machine(row)}; row `{row.id}`)."
    )
    return section("Speed", note, ("what", "images/s", "ratio"), lines)


def preflight(results: Path) -> str:
    path = results / "preflight.json"
    if not path.exists():
        return ""
    lines = [
        (
            r["config"],
            r["topology"],
            " x ".join(f"{k}={v}" for k, v in r["mesh"].items()),
            r["batch"],
            f"{r['state_gib']:.2f} + {r['temp_gib']:.2f} of {r['hbm_gib']}",
            f"{1000 * r['seconds_at_peak']:.0f}",
            f"{sum(gib for _, gib in r['collectives'].values()):.1f}",
        )
        for r in json.loads(path.read_text())
    ]
    note = (
        "The released recipes, compiled for chips without one: GiB a chip (state + temporaries), milliseconds of a step at "
        "the chips' peak, GiB of collectives a step through a chip."
    )
    header = ("recipe", "topology", "mesh", "batch", "GiB", "ms at peak", "collectives, GiB")
    return section("Preflight", note, header, lines)


def _probed(rows: Sequence[ResultRow], metrics: Sequence[str]) -> list[tuple]:
    """A line for each row of I-JEPA, the untrained encoder and raw pixels, with these metrics in %."""
    names = {"jepa_pretrain": "I-JEPA"} | {f"baseline_{k}": name for k, name in KINDS.items()}
    chosen = [row for row in rows if row.job in names]
    lines = []
    for row in sorted(chosen, key=lambda row: (list(names).index(row.job), row.seeds)):
        shown = [percent(row.metrics[m]) if m in row.metrics else "" for m in metrics]
        lines.append((names[row.job], row.seeds[0], *shown, row.id))
    return lines


SECTIONS: tuple[Section, ...] = (scenes, cifar10, speed, preflight)
