"""What the tables of all papers share."""

from collections.abc import Callable, Sequence
from pathlib import Path

from common.results import ResultRow, markdown_table

HERE = Path(__file__).parents[1]
Section = Callable[[Path], str]  # folder of rows -> Markdown, "" where there are no rows


def section(title: str, note: str, header: Sequence[str], lines: Sequence[Sequence]) -> str:
    return f"### {title}\n\n{note}\n\n{markdown_table(header, lines)}" if lines else ""


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def perplexity(value: float) -> str:
    return f"{value:.1e}" if value >= 1000 else f"{value:.2f}"


def known(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def machine(row: ResultRow) -> str:
    """The accelerator that a row was measured on, or else the processor."""
    return row.hardware.split("; ")[-1]
