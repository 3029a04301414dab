"""Gradient Descent: The Ultimate Optimizer."""

from pathlib import Path

from common.results import read_rows
from common.writers import read_metrics
from experiments.metaopt.grid_job import grid_table, score_at
from experiments.metaopt.table1 import with_published
from experiments.shared.published import published
from experiments.shared.tables import Section, known, machine, percent, section


def table1(results: Path) -> str:
    rows = read_rows(results / "mnist_table1.jsonl")
    seeds = sorted({len(row.seeds) for row in rows})
    note = (
        f"MNIST, test error in %, mean ± sd over {' or '.join(map(str, seeds))} seeds. Rerun: the plain optimizer "
        "with the values that the tower ended at."
    )
    return f"### Table 1\n\n{note}\n\n{with_published(rows)}" if rows else ""


def figure4(results: Path) -> str:
    """4a: every level from the same rate; 4b: levels above from the authors' table of rates (docs/papers/gdtuo.md 3.5)."""
    rows = read_rows(results / "mnist_towers.jsonl")
    rates = sorted({row.overrides["initial_rate"] for row in rows})
    paper = _published("Figure 4a") | _published("Figure 4b")
    lines = []
    for method in sorted({row.overrides["method"] for row in rows}, key=_by_name):
        lines.append((f"{method}, ours", *[score_at(rows, method, rate) for rate in rates]))
        points = [paper.get((method, f"{rate:g}"), "") for rate in rates]
        if any(points):
            lines.append((f"{method}, paper", *points))
    note = (
        "MNIST, SGD, 30 epochs, one seed, test error in % by initial rate; a star where a run diverged. The paper's are "
        "read off its figure (± 0.5). 4a: tower1 to tower5; 4b: table_tower1 to table_tower3."
    )
    return section("Figure 4a and 4b", note, ("method", *[f"{r:g}" for r in rates]), lines)


def _by_name(method: str) -> tuple[bool, bool, bool, str]:
    """Ours first, then plain optimizers, then the towers of 4a and of 4b by height."""
    return "table" in method, "tower" in method, not method.startswith("auto"), method


def figure2(results: Path) -> str:
    rows = read_rows(results / "cifar10_resnet20.jsonl")
    papers = [_published("Figure 2a"), _published("Figure 2b")]
    lines = []
    for row in rows:
        method, rate = row.overrides["method"], row.overrides["initial_rate"]
        points = [paper.get((method, f"{rate:g}"), "") for paper in papers]
        learned = row.metrics.get("learned/learning_rate")
        lines.append(
            (
                method,
                f"{rate:g}",
                score_at([row], method, rate),
                f"{row.metrics['train_loss']:.3f}",
                "" if learned is None else f"{learned:.2g}",
                *points,
                row.id,
            )
        )
    steps = "/".join(sorted({f"{row.steps:,}" for row in rows}))
    note = (
        f"ResNet-20 on CIFAR-10, batch 128, momentum in brackets: test error in % after {steps} steps. The paper's are "
        "after 78,000 (2a) and 195,000 (2b), read off the figure (± 5 % of themselves)."
    )
    header = (
        "optimizer",
        "initial rate",
        "error",
        "training loss",
        "rate at the end",
        "paper 2a",
        "paper 2b",
        "row",
    )
    return section("Figure 2", note, header, lines)


def robustness(results: Path) -> str:
    texts = []
    for path in sorted(results.glob("robustness_*.jsonl")):
        rows = read_rows(path)
        score = "error" if "error" in rows[0].metrics else "perplexity"
        where = machine(rows[0])
        note = (
            f"Test {'error in %' if score == 'error' else score} after {rows[0].steps} steps, by initial rate, "
            f"{len(rows[0].seeds)} seed(s), {where}. Worst and mean: of a method's runs, as a multiple of the best run "
            "of all. Diverged: least share of its runs that did not end finite; a star marks where."
        )
        name = path.stem.removeprefix("robustness_")
        texts.append(f"### Robustness: {name}\n\n{note}\n\n{grid_table(rows, score)}")
    return "\n".join(texts)


def figure3(results: Path) -> str:
    """Figure 3 from the rows that a run writes after every epoch: results/metaopt/charrnn/<method>.jsonl."""
    paths = sorted((results / "charrnn").glob("*.jsonl"))
    ends = {path.stem: read_metrics(path)[-1] for path in paths}
    if not ends:
        return ""
    prefix = "perplexity from "
    rates = [k.removeprefix(prefix) for k in next(iter(ends.values())) if k.startswith(prefix)]
    lines = [
        (method, *[f"{end[prefix + rate]:.2f}" for rate in rates]) for method, end in ends.items()
    ]
    epochs = {end["step"] for end in ends.values()}
    note = (
        f"Char-RNN on War and Peace, test perplexity by initial rate after {'/'.join(map(str, sorted(epochs)))} of 49 "
        "epochs, mean of 3 seeds, on one H100 whose loan ended there. The schedule of cosine(adam) has hardly begun to fall."
    )
    return section("Figure 3, its first part", note, ("method", *rates), lines)


def overhead(results: Path) -> str:
    rows = read_rows(results / "bench_overhead.jsonl")
    lines = []
    for key in ("level1", "level3", "level50", "level50_level1", "auto", "gdtuo"):
        row = next((r for r in reversed(rows) if f"ratio_{key}" in r.metrics), None)
        if row:
            low, middle, high = (
                100 * (row.metrics[f"ratio{k}_{key}"] - 1) for k in ("_low", "", "_high")
            )
            extra = row.metrics.get(f"extra_bytes_{key}")
            bytes_ = "" if extra is None else f"{extra:,.0f}"
            lines.append((key, f"{middle:+.1f}", f"{low:+.1f} to {high:+.1f}", bytes_, row.id))
    note = (
        "AdamW on an MLP of 10M parameters, batch 256: additional time of a step in %, median and quartiles of pairs. "
        "level50_level1: 50 levels against one; gdtuo: the original package against torch's Adam."
    )
    header = ("what", "median", "quartiles", "additional bytes", "row")
    return section("Figure 4f: overhead", note, header, lines)


def across_papers(results: Path) -> str:
    """What `config.optim.auto=true` does to the other papers' training: the rows of results/metaopt/across."""
    shown = (
        ("sinks", "vanilla/4+252", known),
        ("jepa", "linear_count", percent),
        ("jepa", "linear_distance", percent),
    )
    lines = []
    for paper, metric, show in shown:
        pair = [read_rows(results / "across" / f"{paper}_{how}.jsonl") for how in ("hand", "auto")]
        if all(pair):
            hand, auto = (rows[-1] for rows in pair)
            values = [show(row.metrics[metric]) for row in (hand, auto)]
            lines.append((paper, metric, *values, hand.steps, hand.id, auto.id))
    note = (
        "One run each: learning rate and weight decay by the config's schedule, and learned on the way "
        "(`--config.optim.auto=true`). sinks: perplexity a byte of held-out text, the lower the better; jepa: accuracy of "
        "the linear probe on scenes in %."
    )
    header = ("training", "metric", "by hand", "auto", "steps", "row by hand", "row of auto")
    return section("Across papers", note, header, lines)


def _published(figure: str) -> dict[tuple[str, str], str]:
    """The errors of a figure of the paper, in %, by method, and initial rate as "%g" writes it."""
    return {
        (p.what, p.setting.removeprefix("initial_rate=")): p.value
        for p in published("metaopt")
        if (p.table, p.metric) == (figure, "test error")
    }


SECTIONS: tuple[Section, ...] = (
    table1,
    figure4,
    figure2,
    robustness,
    figure3,
    overhead,
    across_papers,
)
