"""What a paper printed: the rows of experiments/PAPER/published.csv, all from the paper itself."""

import csv
from dataclasses import dataclass

from experiments.shared.tables import HERE


@dataclass(frozen=True)
class Published:
    """One number of a paper's tables, figures or text.

    Attributes:
      id: unique within the paper, "table2/falcon-7b/4+2044".
      what, setting: the model or method, by our name where we have one, and what else tells the row from its neighbours.
      value, spread: as printed. A value is a number, but for "OOM" and orders of growth.
      unit: "%", "ppl"...; "" for a bare number.
    """

    id: str
    table: str
    what: str
    setting: str
    metric: str
    value: str
    spread: str
    unit: str
    source: str


def published(paper: str) -> list[Published]:
    """Every row of `paper`, a folder of experiments/, in the paper's order."""
    with open(HERE / paper / "published.csv") as file:
        return [Published(**row) for row in csv.DictReader(file)]
