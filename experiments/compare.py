"""Runs side by side: their curves in one picture, and how each ended as a table.

  python -m experiments.compare runs/by_hand runs/auto --series=loss,lr,weight_decay --out=compare.png

Every run is a workdir, or any folder or file of rows (metrics.jsonl). Runs still going are drawn as far as they are.
"""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.plots import NOT_CURVES, curves
from common.writers import read_metrics

KINDS = ("png", "pdf", "svg", "jpg", "jpeg", "webp", "tif", "tiff", "eps", "ps")  # that need no TeX

Rows = Sequence[Mapping[str, float]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders that hold a metrics.jsonl")
    parser.add_argument(
        "--series", default="", help="by comma; default: all that more than one run has"
    )
    parser.add_argument("--names", default="", help="of the runs, by comma; default: their folders")
    parser.add_argument(
        "--out", default="compare.png", help=f"the picture ({', '.join(KINDS)}), or its folder"
    )
    args = parser.parse_args(argv)
    names = args.names.split(",") if args.names else names_of(args.runs)
    try:
        check_runs(args.runs)
        if len(names) != len(args.runs) or len(set(names)) != len(names):
            parser.error(f"--names={args.names}: needs {len(args.runs)} different names")
        picture = picture_path(args.out)
        runs = {name: read(path) for name, path in zip(names, args.runs)}
        series = choose(runs, [s.strip() for s in args.series.split(",") if s.strip()])
        draw_comparison(runs, series, picture)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("last values")
    Console().print(last_values(runs, series), crop=False)
    print(f"drew {picture}")
    return 0


def check_runs(paths: Sequence[Path]) -> None:
    """Raises ValueError where two paths lead to the same rows."""
    first: dict[Path, Path] = {}
    for path in paths:
        other = first.setdefault(_file(path).resolve(), path)
        if other is not path:
            also = "" if str(other) == str(path) else f", also as {other}"
            raise ValueError(f"{path} is given twice{also}: give each run once")


def picture_path(out: str) -> Path:
    """The file that --out means: compare.png in a folder, a PNG where no kind is named.

    Raises ValueError for a kind that cannot be drawn.
    """
    path = Path(out).expanduser()
    if path.is_dir() or out.endswith(os.sep):
        return path / "compare.png"
    if path.suffix in ("", "."):
        return path.with_name(path.name.rstrip(".") + ".png")
    if path.suffix[1:].lower() not in KINDS:
        raise ValueError(f"--out={out}: a picture is one of {', '.join(KINDS)}")
    return path


def names_of(paths: Sequence[Path]) -> list[str]:
    """The folders' names, from the first level at which they differ."""
    parts = [path.resolve().parts for path in paths]
    shared = min(map(len, parts)) - 1
    depth = next((i for i in range(shared) if len({p[i] for p in parts}) > 1), shared)
    return ["/".join(p[depth:]).removesuffix("/metrics.jsonl") for p in parts]


def read(path: Path) -> Rows:
    """The rows of a run. Raises ValueError where there are none."""
    file = _file(path)
    if not file.exists():
        inside = sorted(p.parent for p in path.glob("**/metrics.jsonl"))[:3]
        hint = f"; did you mean {', '.join(map(str, inside))}?" if inside else ""
        raise ValueError(f"{path} holds no metrics.jsonl{hint}")
    rows = read_metrics(file)
    if not rows:
        raise ValueError(f"{file} has no rows yet")
    return rows


def _file(path: Path) -> Path:
    return path / "metrics.jsonl" if path.is_dir() else path


def choose(runs: Mapping[str, Rows], wanted: Sequence[str]) -> list[str]:
    """The series to show: those wanted, or all that two runs share. Raises ValueError naming one that no run has."""
    held = {name: {k for row in rows for k in row} - set(NOT_CURVES) for name, rows in runs.items()}
    every = [k for k in dict.fromkeys(k for rows in runs.values() for row in rows for k in row)]
    if unknown := [s for s in wanted if not any(s in has for has in held.values())]:
        known = ", ".join(k for k in every if k not in NOT_CURVES)
        raise ValueError(f"--series={','.join(unknown)}: no run has it; they have {known}")
    enough = min(2, len(runs))
    return list(wanted) or [k for k in every if sum(k in has for has in held.values()) >= enough]


def draw_comparison(runs: Mapping[str, Rows], series: Sequence[str], path: Path) -> None:
    """A panel for each series, a line in it for each run."""
    rows = [
        {"step": row["step"], **{f"{name}\n{key}": row[key] for key in series if key in row}}
        for name, rows in runs.items()
        for row in rows
    ]
    groups = {key: {f"{name}\n{key}": name for name in runs} for key in series}
    curves(rows, path, groups)


def last_values(runs: Mapping[str, Rows], series: Sequence[str]) -> Table:
    """The last value of each series in each run: a part for each series, a row in it for each run.

    Numbers are never cut, however narrow the terminal: names go over several lines.
    """
    table = Table("series", "run")
    table.columns[0].overflow = table.columns[1].overflow = "fold"
    table.add_column("last", justify="right", no_wrap=True)
    last = {run: {k: v for row in rows for k, v in row.items()} for run, rows in runs.items()}
    for key in ["step", *series]:
        for number, run in enumerate(runs):
            value = f"{last[run].get(key, math.nan):{'.0f' if key == 'step' else '.5g'}}"
            table.add_row("" if number else escape(key), escape(run), value)
        table.add_section()
    return table


if __name__ == "__main__":
    sys.exit(main())
