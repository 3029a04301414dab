"""The reproduction tables of each paper, from the committed rows and the papers' own numbers: docs/results/tables.md.

  python -m experiments.tables [--results=experiments/results] [--out=docs/results/tables.md] [--check]

Nothing in the file is typed: every number of ours is a row's (its id stands next to it), every number of a paper comes
from experiments/PAPER/published_*.csv or from the job that runs the table. `--check` writes nothing and fails where the
file is out of date.
"""

import argparse
import sys
from pathlib import Path

from experiments.jepa import tables as jepa
from experiments.metaopt import tables as metaopt
from experiments.shared.tables import HERE
from experiments.sinks import tables as sinks

HEAD = """# Reproduction tables

Written by `python -m experiments.tables` from the rows in `experiments/results/`; do not edit. All on 2 CPU cores unless a
row says otherwise. report.md says what they mean, ../journal.md how they came about.
"""
PAPERS = {
    "metaopt: Gradient Descent: The Ultimate Optimizer": metaopt,
    "sinks: StreamingLLM": sinks,
    "jepa: I-JEPA": jepa,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of rows")
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE.parent / "docs" / "results" / "tables.md",
        help="file to write",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        parser.error(f"--results={args.results} is no folder")
    text = render(args.results)
    if args.check:
        if not args.out.exists() or args.out.read_text() != text:
            print(f"{args.out} is out of date: run python -m experiments.tables", file=sys.stderr)
            return 1
        return 0
    args.out.write_text(text)
    print(f"wrote {args.out}")
    return 0


def render(results: Path) -> str:
    """The whole file."""
    parts = [HEAD]
    for title, paper in PAPERS.items():
        folder = results / paper.__name__.split(".")[-2]
        found = [text for section in paper.SECTIONS if (text := section(folder))]
        parts += [f"## {title}\n", *found] if found else []
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
