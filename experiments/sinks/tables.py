"""StreamingLLM."""

from pathlib import Path

from common.results import read_rows
from experiments.shared.tables import Section, known, section
from experiments.sinks.reproduce import paper


def table2(results: Path) -> str:
    rows = read_rows(results / "quick.jsonl")
    if not rows:
        return ""
    row = rows[-1]
    ours = {
        k.removeprefix("perplexity/").split()[-1]: v
        for k, v in row.metrics.items()
        if k.startswith("perplexity/")
    }
    lines = [("SmolLM2-135M, ours", *[_of(ours, sinks) for sinks in (0, 1, 2, 4, 8)], row.id)]
    for model, values in paper().items():
        lines.append((model, *[f"{value:.2f}" for value in values], "paper"))
    note = (
        "Perplexity by the number of sinks kept; 0 is window attention. Ours: War and Peace through 256 tokens "
        f"(dense {ours['dense']:.1f}, re-computation {ours['recompute']:.1f} ± "
        f"{row.metrics['standard_error/recompute']:.1f}); the paper's: 400,000 tokens of PG-19 through 2,048 "
        "(Llama-2: 4,096)."
    )
    return section("Table 2: sinks", note, ("model", "0", "1", "2", "4", "8", "row"), lines)


def decode(results: Path) -> str:
    rows = read_rows(results / "bench_decode.jsonl")
    if not rows:
        return ""
    row, prefix = rows[-1], "tokens_per_second_"
    lines = []
    for key, rate in row.metrics.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            share = row.metrics.get(f"share_of_limit_{name}")
            lines.append(
                (
                    name,
                    f"{rate:.1f}",
                    known(row.metrics.get(f"ratio_{name}")),
                    "" if share is None else f"{100 * share:.0f} %",
                )
            )
    note = (
        f"SmolLM2-135M at 4+1020, tokens a second (row `{row.id}`). Ratio: to transformers' best in the same run. "
        "Far: at token 1,000,000 instead of 10,000. Limit: reading the weights and the cache once for every token, at "
        "the measured copy rate."
    )
    return section("Speed", note, ("what", "tokens/s", "ratio", "of the memory limit"), lines)


def _of(values: dict[str, float], sinks: int) -> str:
    """The perplexity of the setting "sinks+recent"."""
    return next((f"{v:.2f}" for name, v in values.items() if name.startswith(f"{sinks}+")), "")


SECTIONS: tuple[Section, ...] = (table2, decode)
