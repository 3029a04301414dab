"""What became of every number that the papers print: docs/results/coverage.md, which experiments/tables.py writes.

The numbers are in experiments/PAPER/published.csv, what became of them in coverage.csv there. A number's column is that
of the first line whose pattern of ids fits it and which fills the column:

  rows      the pattern, as a shell has it: "table2/*/4+*"
  status    a key of NEEDS, which are the columns that it needs
  result    FILE?KEY=VALUE;KEY=VALUE: rows of results/PAPER/FILE by fields and overrides; several are seeds, and averaged
  metric    of these rows; "A over B" and "A minus 1" are computed. A percentage is 100 times the metric
  command   at the paper's size: what follows `python -m experiments.launch --config=`
  cost      of the command, a product such as "2 x 7e9 parameters x 400000 tokens": FLOPs, which an H100 does at 40 % of its
            peak. "preflight CONFIG" is a recipe's FLOPs an image, "row RESULT" a row's wall seconds instead of FLOPs
  note      what differs from the paper, or why there is no result

In result, {what} and {setting} are the number's.
"""

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any

from common.flops import PEAK_FLOPS
from common.results import markdown_table
from common.writers import read_metrics
from experiments.shared.published import Published, published
from experiments.shared.tables import HERE

CHIP, MFU = "H100", 0.4
NEEDS = {
    "reproduced": ("result", "metric"),
    "small analogue": ("result", "metric", "note"),
    "command only": ("command", "cost"),
    "not feasible": ("note",),
    "rival's number": ("note",),
}
PAPERS = {  # folder: what published.csv leaves out
    "metaopt": "13 settings; two marks of Figure 4b that the paper does not explain; the tables of the first preprint.",
    "sinks": "10 settings; the curves of Figures 3, 5, 6, 9, 12 and 15, which have no numbers; 8 memory sizes of Figure 10, "
    "whose bars have no names.",
    "jepa": "Figures 1 and 5, which have no numbers; the settings of the released configs; the training time of the first "
    "preprint.",
}
HEAD = f"""# Coverage of the papers

Written by `python -m experiments.tables` from the rows in `experiments/results/` and from `published.csv` and `coverage.csv`
of each paper's folder in `experiments/`; do not edit.

- *Reproduced*: the paper's protocol ran here. The difference is ours minus the paper's.
- *Small analogue*: the same measurement at a size for a small machine. The two numbers are not comparable.
- *Command only*: the command is ready; nobody has run it at the paper's size.
- *Not feasible*: this project cannot measure it yet. The last column says why.
- *Rival's number*: the paper quotes another method.

Hours of an {CHIP} are estimates: the FLOPs after the equals sign at {100 * MFU:.0f} % of the chip's
{PEAK_FLOPS[CHIP] / 1e12:.0f} TFLOP/s, without the loading of weights.
"""


@dataclass(frozen=True)
class Entry:
    """A number of the paper and what became of it; see the module's text."""

    number: Published
    status: str
    result: str
    metric: str
    command: str
    cost: str
    note: str


def entries(paper: str) -> list[Entry]:
    """Every number of `paper`, a key of PAPERS. Raises ValueError naming one that lacks a status or what it needs."""
    with open(HERE / paper / "coverage.csv") as file:
        lines = list(csv.DictReader(file))
    found = []
    for number in published(paper):
        fit = [line for line in lines if fnmatchcase(number.id, line["rows"])]
        given = {k: next((line[k] for line in fit if line[k]), "") for k in lines[0] if k != "rows"}
        if given["status"] not in NEEDS:
            raise ValueError(f"{paper}/coverage.csv: {number.id} has status {given['status']!r}")
        if lacking := [k for k in NEEDS[given["status"]] if not given[k]]:
            raise ValueError(f"{paper}/coverage.csv: {number.id} has no {lacking[0]}")
        given["result"] = given["result"].format(**vars(number))
        found.append(Entry(number, **given))
    return found


def ours(entry: Entry, results: Path) -> tuple[float, float, int, list[str]]:
    """An entry's result in the paper's unit: mean, spread (NaN where there is none), number of seeds, the rows' ids."""
    rows, scale = _rows(results, entry.result), 100 if entry.number.unit == "%" else 1
    values = [scale * _metric(row.get("metrics", row), entry.metric) for row in rows]
    ids = [row.get("id", entry.result) for row in rows]
    if len(rows) > 1:
        if len({str(row["seeds"]) for row in rows}) < len(rows):
            raise ValueError(f"{entry.result}: several rows have the same seed: {', '.join(ids)}")
        return statistics.fmean(values), statistics.stdev(values), len(rows), ids
    spread = float(rows[0].get("metrics", {}).get(f"{entry.metric}_sd", "nan"))
    return values[0], scale * spread, len(rows[0].get("seeds", [])), ids


def _rows(results: Path, which: str) -> list[dict[str, Any]]:
    """Raises ValueError where there is none."""
    file, _, keys = which.partition("?")
    wanted = dict(key.split("=", 1) for key in keys.split(";") if key)

    def fits(row: dict[str, Any]) -> bool:
        seen = {k: (row | row.get("overrides", {})).get(k) for k in wanted}
        return wanted == {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in seen.items()}

    rows = [row for row in read_metrics(results / file) if fits(row)]
    if not rows:
        raise ValueError(f"{results / file} has no row with {keys}")
    return rows


def _metric(metrics: dict[str, Any], name: str) -> float:
    top, _, below = name.partition(" over ")
    top, less, _ = top.partition(" minus 1")
    return float(metrics[top]) / (float(metrics[below]) if below else 1) - bool(less)


def hours(cost: str, results: Path) -> str:
    """The chip-hours of a cost, and what they are computed from."""
    first, *factors = cost.split(" x ")
    kind, _, name = first.partition(" ")
    unit, rate = f"{CHIP}-hours", MFU * PEAK_FLOPS[CHIP]
    if kind == "row":
        (row,) = _rows(results, name)
        amount, unit, rate = row["wall_seconds"], f"hours of {row['hardware'].split('; ')[-1]}", 1
        first = f"{amount:.0f} s of row {row['id']}"
    elif kind == "preflight":
        recipes = json.loads((results / "preflight.json").read_text())
        amount = next(r["flops"] / r["batch"] for r in recipes if r["config"] == name)
        first = f"{amount:.3g} FLOPs an image by preflight"
    else:
        amount = float(kind)
    took = amount * math.prod(float(factor.split()[0]) for factor in factors) / rate / 3600
    shown = f"{took:,.0f}" if took >= 10 else f"{took:.2g}"
    return f"{shown} {unit} = {' x '.join([first, *factors])}"


def render(results: Path) -> str:
    """The whole page, from a folder of rows like experiments/results."""
    known = {paper: entries(paper) for paper in PAPERS}
    counts = [
        (paper, len(found), *[sum(entry.status == status for entry in found) for status in NEEDS])
        for paper, found in known.items()
    ]
    parts = [HEAD, markdown_table(("paper", "numbers", *NEEDS), counts)]
    for paper, found in known.items():
        parts.append(f"## {paper}\n\nLeft out: {PAPERS[paper]}\n")
        for table, group in groupby(found, lambda entry: entry.number.table):
            parts.append(f"### {table}\n\n{_table(list(group), results / paper)}")
    return "\n".join(parts)


def _table(found: Sequence[Entry], results: Path) -> str:
    """A line for each number that has a result, one for all others of a status, note and unit; then the commands."""
    lines: dict[Any, tuple[str, ...]] = {}
    for entry in found:
        number, key = entry.number, (entry.status, entry.note, entry.number.unit)
        if "result" in NEEDS[entry.status]:
            lines[number.id] = _line(entry, results)
        elif key not in lines:
            alike = [e.number for e in found if (e.status, e.note, e.number.unit) == key]
            names = "; ".join(dict.fromkeys(n.what for n in alike))
            name = f"`{number.id}`" if len(alike) == 1 else f"{len(alike)} numbers: {names}"
            lines[key] = name, _range(alike), entry.status, "–", "–", entry.note or "see below"
    header = ("number", "paper", "status", "ours", "difference", "row, note")
    text, bullets = markdown_table(header, lines.values()), []
    for command, cost in dict.fromkeys((e.command, e.cost) for e in found if e.command):
        launch = f"python -m experiments.launch --config={command}"
        bullets.append(f"- `{launch}`: {hours(cost, results)}\n")
    return "\n".join(filter(None, [text, "".join(bullets)]))


def _line(entry: Entry, results: Path) -> tuple[str, ...]:
    number, (value, spread, seeds, ids) = entry.number, ours(entry, results)
    printed = len(number.value.partition(".")[2])
    digits = max(2, printed if number.unit else printed + 1)  # bare numbers are small
    shown = f"{value:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")
    shown += f" ({seeds} seed{'s' if seeds > 1 else ''})" if seeds else ""
    reproduced = entry.status == "reproduced"
    more = f"{round(value - float(number.value), digits) + 0.0:+.{digits}f}" if reproduced else "–"
    where = ", ".join(ids) + (f"; {entry.note}" if entry.note else "")
    return f"`{number.id}`", _printed(number), entry.status, shown, more, where


def _printed(number: Published) -> str:
    spread = f" ± {number.spread}" if number.spread else ""
    return f"{number.value}{spread} {number.unit}".strip()


def _range(numbers: Sequence[Published]) -> str:
    """The least and the greatest as they are printed; what is no number, in full."""
    try:
        low, *_, high = sorted([*numbers, *numbers], key=lambda number: float(number.value))
    except ValueError:
        return ", ".join(dict.fromkeys(number.value for number in numbers))
    if low.value == high.value:
        return _printed(low)
    return f"{low.value} to {high.value} {high.unit}".strip()
