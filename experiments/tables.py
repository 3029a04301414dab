"""The reproduction tables of each paper, from the committed rows and the papers' own numbers: experiments/TABLES.md.

  python -m experiments.tables [--results=experiments/results] [--out=experiments/TABLES.md] [--check]

Nothing in the file is typed: every number of ours is a row's (its id stands beside it), every number of a paper comes from
experiments/paper/ or from the job that runs the table. `--check` writes nothing and fails where the file is out of date.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.results import ResultRow, markdown_table, read_rows
from common.writers import read_rows as read_metrics
from experiments.jepa_baselines import KINDS
from experiments.metaopt_job import gaps
from experiments.metaopt_table1 import ROWS as TABLE1
from experiments.metaopt_table1 import percent
from experiments.sinks_quick import paper as sinks_paper

HERE = Path(__file__).parent
PAPER = HERE / "paper"
HEAD = """# Reproduction tables

Written by `python -m experiments.tables` from the rows in `experiments/results/`; do not edit. All on 2 CPU cores unless a
row says otherwise. README.md says what they mean, LOG.md how they came about.
"""
Section = Callable[[Path], str]  # folder of rows -> Markdown, "" where there are no rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "TABLES.md")
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


def section(title: str, note: str, header: Sequence[str], lines: Sequence[Sequence]) -> str:
    return f"### {title}\n\n{note}\n\n{markdown_table(header, lines)}" if lines else ""


# --- Gradient Descent: The Ultimate Optimizer


def metaopt_table1(results: Path) -> str:
    rows = {r.overrides["row"]: r for r in read_rows(results / "metaopt_mnist_table1.jsonl")}
    lines = []
    for row in TABLE1:
        ours, again = rows.get(row.name), rows.get(f"{row.name}, rerun")
        if ours:
            rerun = (percent(again.metrics), _known(row.paper_rerun)) if again else ("", "")
            lines.append((row.name, percent(ours.metrics), _known(row.paper), *rerun, ours.id))
    seeds = sorted({len(row.seeds) for row in rows.values()})
    note = (
        f"MNIST, test error in %, mean ± sd over {' or '.join(map(str, seeds))} seeds. Rerun: the plain optimizer "
        "with the values that the tower ended at."
    )
    header = ("optimizer", "ours", "paper", "rerun", "paper's rerun", "row")
    return section("Table 1", note, header, lines)


def metaopt_figure4a(results: Path) -> str:
    rows = read_rows(results / "metaopt_mnist_towers.jsonl")
    with open(PAPER / "metaopt_figure4a.csv") as file:
        points = [
            (int(p["height"]), float(p["rate"]), float(p["error"])) for p in csv.DictReader(file)
        ]
    rates = sorted({row.overrides["initial_rate"] for row in rows})
    lines = [
        (f"{method}, ours", *[_at(rows, method, rate, _percent) for rate in rates])
        for method in dict.fromkeys(row.overrides["method"] for row in rows)
    ]
    paper = {
        "sgd, paper": [[e for h, r, e in points if h == 0 and _same(r, rate)] for rate in rates],
        "best tower of the paper": [
            [e for h, r, e in points if h > 0 and _same(r, rate)] for rate in rates
        ],
    }
    lines += [
        (name, *[f"{min(found):.1f}" if found else "" for found in errors])
        for name, errors in paper.items()
    ]
    note = "MNIST, SGD, 30 epochs, one seed, test error in % by initial rate. The paper's are read off its figure (± 0.5)."
    return section("Figure 4a", note, ("method", *[f"{r:g}" for r in rates]), lines if rows else [])


def metaopt_robustness(results: Path) -> str:
    texts = []
    for path in sorted(results.glob("metaopt_robustness_*.jsonl")):
        rows = read_rows(path)
        score = "error" if "error" in rows[0].metrics else "perplexity"
        rates = sorted({row.overrides["initial_rate"] for row in rows})
        show = _percent if score == "error" else _perplexity
        machine = _machine(rows[0])
        lines = [
            (
                method,
                *[_at(rows, method, rate, show, score) for rate in rates],
                f"{gap.worst:.3g}",
                f"{gap.diverged:.2g}",
            )
            for method, gap in sorted(gaps(rows, score).items(), key=lambda item: item[1].worst)
        ]
        note = (
            f"Test {'error in %' if score == 'error' else score} after {rows[0].steps} steps, by initial rate, "
            f"{len(rows[0].seeds)} seed(s), {machine}; worst: of a method's runs, as a multiple of the best run of all; "
            "diverged: share of its runs, which a star marks."
        )
        name = path.stem.removeprefix("metaopt_robustness_")
        header = ("method", *[f"{r:g}" for r in rates], "worst", "diverged")
        texts.append(section(f"Robustness: {name}", note, header, lines))
    return "\n".join(texts)


def metaopt_figure3(results: Path) -> str:
    """From the rows that a run writes after every epoch: results/metaopt_charrnn/<method>.jsonl."""
    paths = sorted((results / "metaopt_charrnn").glob("*.jsonl"))
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
        "epochs, mean of 3 seeds, on one H100 whose loan ended there; the schedule of cosine(adam) has hardly begun to fall."
    )
    return section("Figure 3, its first part", note, ("method", *rates), lines)


def metaopt_overhead(results: Path) -> str:
    rows = read_rows(results / "metaopt_overhead.jsonl")
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
    """What `config.optim.auto=true` does to the other papers' training: the rows of results/across."""
    shown = (
        ("sinks", "vanilla/4+252", _known),
        ("jepa", "linear_count", _percent),
        ("jepa", "linear_distance", _percent),
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


# --- StreamingLLM


def sinks_table2(results: Path) -> str:
    rows = read_rows(results / "sinks_quick.jsonl")
    if not rows:
        return ""
    row = rows[-1]
    ours = {
        k.removeprefix("perplexity/").split()[-1]: v
        for k, v in row.metrics.items()
        if k.startswith("perplexity/")
    }
    lines = [("SmolLM2-135M, ours", *[_of(ours, sinks) for sinks in (0, 1, 2, 4, 8)], row.id)]
    for model, values in sinks_paper().items():
        lines.append((model, *[f"{value:.2f}" for value in values], "paper"))
    note = (
        "Perplexity by the number of sinks kept; 0 is window attention. Ours: War and Peace through 256 tokens "
        f"(dense {ours['dense']:.1f}, re-computation {ours['recompute']:.1f} ± "
        f"{row.metrics['standard_error/recompute']:.1f}); the paper's: 400,000 tokens of PG-19 through 2,048 "
        "(Llama-2: 4,096)."
    )
    return section("Table 2: sinks", note, ("model", "0", "1", "2", "4", "8", "row"), lines)


def sinks_decode(results: Path) -> str:
    rows = read_rows(results / "bench_sinks_decode.jsonl")
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
                    _known(row.metrics.get(f"ratio_{name}")),
                    "" if share is None else f"{100 * share:.0f} %",
                )
            )
    note = (
        f"SmolLM2-135M at 4+1020, tokens a second (row `{row.id}`); ratio: to transformers' best in the same run; "
        "far: at token 1,000,000 instead of 10,000; limit: reading the weights and the cache once for every token, at "
        "the measured copy rate."
    )
    return section("Speed", note, ("what", "tokens/s", "ratio", "of the memory limit"), lines)


# --- I-JEPA


def jepa_scenes(results: Path) -> str:
    note = "`make reproduce`: linear probe on 4,000 test scenes, accuracy in %."
    columns = ("count", "distance", "shape")
    rows = read_rows(results / "jepa_scenes.jsonl")
    lines = _probed(rows, [f"linear_{name}" for name in columns])
    return section("Scenes", note, ("features", "seed", *columns, "row"), lines)


def jepa_cifar10(results: Path) -> str:
    rows = read_rows(results / "jepa_cifar10.jsonl")
    if not rows:
        return ""
    columns = ("linear_label/last", "linear_label/last4", "knn_label")
    other = read_rows(results / "jepa_cifar10_vicreg0.01.jsonl")
    lines = _probed(rows, columns)
    lines += [(f"{what}, C-JEPA's terms at 0.01", *rest) for what, *rest in _probed(other, columns)]
    with open(PAPER / "jepa_cifar10.csv") as file:
        published = "; ".join(
            f"{p['what']}, {p['epochs']} epochs: {p['linear']}"
            + (f" ± {p['spread']}" if p["spread"] else "")
            for p in csv.DictReader(file)
        )
    note = (
        f"ViT-T/4, {rows[0].steps} steps of 512 (60 epochs), {_machine(rows[0])}; test accuracy in %, average pooled target "
        f"encoder, images as JPEG. Published (third-party audit, linear probe): {published}."
    )
    header = ("features", "seed", "linear, last layer", "linear, last 4", "kNN", "row")
    return section("CIFAR-10", note, header, lines)


def _probed(rows: Sequence[ResultRow], metrics: Sequence[str]) -> list[tuple]:
    """A line for each row of I-JEPA, the untrained encoder and raw pixels, with these metrics in %."""
    names = {"jepa_pretrain": "I-JEPA"} | {f"baseline_{k}": name for k, name in KINDS.items()}
    chosen = [row for row in rows if row.job in names]
    lines = []
    for row in sorted(chosen, key=lambda row: (list(names).index(row.job), row.seeds)):
        shown = [_percent(row.metrics[m]) if m in row.metrics else "" for m in metrics]
        lines.append((names[row.job], row.seeds[0], *shown, row.id))
    return lines


def jepa_speed(results: Path) -> str:
    rows = read_rows(results / "bench_jepa_step.jsonl")
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
        f"(row `{row.id}`)."
    )
    return section("Speed", note, ("what", "images/s", "ratio"), lines)


def jepa_preflight(results: Path) -> str:
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
        "The released recipes, compiled for a TPU topology: GiB a chip (state + temporaries), milliseconds of a step at "
        "the chips' peak, GiB of collectives a step through a chip."
    )
    header = ("recipe", "topology", "mesh", "batch", "GiB", "ms at peak", "collectives, GiB")
    return section("Preflight", note, header, lines)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _machine(row: ResultRow) -> str:
    """The accelerator that a row was measured on, or else the processor."""
    return row.hardware.split("; ")[-1]


def _perplexity(value: float) -> str:
    return f"{value:.1e}" if value >= 1000 else f"{value:.2f}"


def _known(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _at(
    rows: Sequence[ResultRow],
    method: str,
    rate: float,
    show: Callable[[float], str],
    score: str = "error",
) -> str:
    """The score of one run; a star where it diverged."""
    for row in rows:
        if row.overrides["method"] == method and row.overrides["initial_rate"] == rate:
            return show(row.metrics[score]) + ("*" if row.metrics["diverged"] else "")
    return ""


def _same(a: float, b: float) -> bool:
    return abs(a / b - 1) < 1e-6


def _of(values: dict[str, float], sinks: int) -> str:
    """The perplexity of the setting "sinks+recent"."""
    return next((f"{v:.2f}" for name, v in values.items() if name.startswith(f"{sinks}+")), "")


PAPERS: dict[str, tuple[Section, ...]] = {
    "metaopt: Gradient Descent: The Ultimate Optimizer": (
        metaopt_table1,
        metaopt_figure4a,
        metaopt_robustness,
        metaopt_figure3,
        metaopt_overhead,
        across_papers,
    ),
    "sinks: StreamingLLM": (sinks_table2, sinks_decode),
    "jepa: I-JEPA": (jepa_scenes, jepa_cifar10, jepa_speed, jepa_preflight),
}


if __name__ == "__main__":
    sys.exit(main())
