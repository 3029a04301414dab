"""The reproduction tables of each paper, from the committed rows and the papers' own numbers: experiments/TABLES.md.

  python -m experiments.tables [--results=experiments/results] [--out=experiments/TABLES.md] [--check]

Nothing in the file is typed: every number of ours is a row's (its id stands beside it), every number of a paper comes from
experiments/paper/ or from the job that runs the table. `--check` writes nothing and fails where the file is out of date.
"""

import argparse
import sys
from pathlib import Path

from experiments.tables import jepa, metaopt, sinks
from experiments.tables.parts import HERE

HEAD = """# Reproduction tables

Written by `python -m experiments.tables` from the rows in `experiments/results/`; do not edit. All on 2 CPU cores unless a
row says otherwise. REPORT.md says what they mean, LOG.md how they came about.
"""
PAPERS = {
    "metaopt: Gradient Descent: The Ultimate Optimizer": metaopt.SECTIONS,
    "sinks: StreamingLLM": sinks.SECTIONS,
    "jepa: I-JEPA": jepa.SECTIONS,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of rows")
    parser.add_argument("--out", type=Path, default=HERE / "TABLES.md", help="file to write")
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
    for paper, sections in PAPERS.items():
        found = [text for section in sections if (text := section(results))]
        parts += [f"## {paper}\n", *found] if found else []
    return "\n".join(parts)
