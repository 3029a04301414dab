"""The reproduction tables of each paper and what they cover: docs/results/tables.md, and coverage.md in the same folder.

  python -m experiments.tables [--results=experiments/results] [--out=docs/results/tables.md] [--check]

Nothing in them is typed: every number of ours is a row's (its id stands next to it), every number of a paper comes from
experiments/PAPER/published.csv. `--check` writes nothing and fails where one is out of date.
"""

import argparse
import sys
from pathlib import Path

from experiments import coverage
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
        help="file to write, with coverage.md in the same folder",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        parser.error(f"--results={args.results} is no folder")
    pages = {args.out: render, args.out.with_name("coverage.md"): coverage.render}
    code = 0
    for path, page in pages.items():
        text = page(args.results)
        if not args.check:
            path.write_text(text)
            print(f"wrote {path}")
        elif not path.exists() or path.read_text() != text:
            print(f"{path} is out of date: run python -m experiments.tables", file=sys.stderr)
            code = 1
        else:
            print(f"{path} is what the rows say")
    return code


def render(results: Path) -> str:
    """The whole of tables.md."""
    parts = [HEAD]
    for title, paper in PAPERS.items():
        folder = results / paper.__name__.split(".")[-2]
        found = [text for section in paper.SECTIONS if (text := section(folder))]
        parts += [f"## {title}\n", *found] if found else []
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
