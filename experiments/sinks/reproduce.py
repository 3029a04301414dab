"""The paper's effect in a minute: SmolLM2-135M reads War and Peace through a cache of 256 tokens (`make reproduce`).

Dense attention, window attention, a sample of re-computation, and 1, 2, 4, 8 sinks. Writes a table and quick.png, next to
the paper's Table 2. Every policy predicts the same tokens; perplexities are of those predicted from a full cache.
"""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.progress import Progress

import sinks
from common.plots import COLORS, GREY, INK
from common.progress import draws_bars
from common.results import markdown_table
from experiments.shared.published import published
from experiments.shared.run import Run
from sinks import perplexity, stream, text
from sinks.loading import Model
from sinks.perplexity import Tally
from sinks.policies import CachePolicy, make_policy

log = logging.getLogger("triptych")
CACHE, CHUNK, SINKS = 256, 512, (1, 2, 4, 8)


def run(workdir: Path, *, tokens: int = 2048, sample: int = 8, model: str = "smollm2-135m") -> int:
    """Scores `tokens` tokens under every policy; skips what is done. Returns an exit code.

    Args:
      workdir: gets results.jsonl, nll.npz (every prediction), quick.png.
      sample: re-computed predictions per chunk of 512.
    """
    values = {
        "job": "sinks_quick",
        "name": "quick",
        "model": model,
        "tokens": tokens,
        "sample": sample,
    }
    run = Run(values, workdir, has_flag=False)
    run.check()
    run.begin(0)
    with run.clock:
        return _run(run)


def _run(run: Run) -> int:
    workdir, tokens = run.workdir, run.values["tokens"]
    scores = workdir / "nll.npz"
    if not scores.exists():
        model = sinks.load(run.values["model"], dtype="bfloat16")
        nll = _score_all(model, tokens, run.values["sample"])
        np.savez(scores.with_suffix(".new.npz"), **nll)  # type: ignore[arg-type]
        scores.with_suffix(".new.npz").rename(scores)
    with np.load(scores) as saved:
        results = summarize({name: saved[name] for name in saved.files})
    if not run.done():
        metrics = {f"{k}/{name}": v for name, r in results.items() for k, v in r.items()}
        run.finish(run.row(metrics, seeds=[0], steps=tokens, dtype="bfloat16"))
    show(results)
    draw_effects(results, workdir / "quick.png")
    log.info("drew %s", workdir / "quick.png")
    return 0


def settings(tokens: int, sample: int) -> dict[str, CachePolicy]:
    """The policies, by the names of the table's rows."""
    bf16: dict[str, Any] = {"dtype": "bfloat16"}
    policies = {"dense": make_policy("dense", cache_size=tokens, **bf16)}
    policies[f"window 0+{CACHE}"] = make_policy("window", cache_size=CACHE, **bf16)
    for s in SINKS:
        policies[f"sinks {s}+{CACHE - s}"] = make_policy("sinks", cache_size=CACHE, sinks=s, **bf16)
    policies["recompute"] = make_policy("recompute", cache_size=CACHE, sample=sample)
    return policies


def _score_all(model: Model, tokens: int, sample: int) -> dict[str, np.ndarray]:
    """-log p of every prediction [N - 1] in nats under each policy, NaN where it was not scored."""
    document = text.documents("embedded")[0]
    excerpt = text.Document(document.name, document.text[: 8 * tokens])
    ids = text.tokens(model.tokenizer, [excerpt])[0][:tokens]
    params = stream.prepare(model.params, stacked=True)
    policies, nll = settings(len(ids), sample), {}
    with Progress(transient=True, disable=not draws_bars()) as bar:
        task = bar.add_task("streaming", total=len(policies) * len(ids))
        for name, policy in policies.items():
            bar.update(task, description=name)
            pieces = []
            for piece in perplexity.score(model.config, params, policy, ids, chunk=CHUNK):
                pieces.append(np.where(piece.scored, piece.nll, np.nan)[: piece.next - piece.first])
                bar.advance(task, piece.next - piece.first)
            nll[name] = np.concatenate(pieces)
    return nll


def summarize(nll: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Perplexity of each policy over the tokens predicted from a full cache.

    Re-computation is sampled: its mean is that of "sinks 4" plus the mean difference to it where both are known, which has
    a far smaller standard error (in nats) than the sample's own mean.
    """
    reference = nll[f"sinks 4+{CACHE - 4}"][CACHE:]
    results = {}
    for name, values in nll.items():
        values = values[CACHE:]
        known = np.isfinite(values)
        if known.all():
            mean, error = Tally.of(values).mean, 0.0
        else:
            difference = Tally.of(values[known] - reference[known])
            mean, error = Tally.of(reference).mean + difference.mean, difference.standard_error
        results[name] = {
            "perplexity": math.exp(mean),
            "standard_error": error * math.exp(mean),
            "predictions": float(known.sum()),
        }
    return results


def paper() -> dict[str, list[float]]:
    """Table 2 of the paper: model -> perplexities with 0, 1, 2, 4, 8 sinks."""
    models: dict[str, list[float]] = {}
    for row in published("sinks"):
        if row.table == "Table 2":
            models.setdefault(row.what, []).append(float(row.value))
    return models


def _ours(results: dict[str, dict[str, float]]) -> list[float]:
    names = [f"window 0+{CACHE}", *(f"sinks {s}+{CACHE - s}" for s in SINKS)]
    return [results[name]["perplexity"] for name in names]


def show(results: dict[str, dict[str, float]]) -> None:
    """Prints our table, and the paper's."""
    print(f"SmolLM2-135M, War and Peace, a cache of {CACHE} tokens: perplexity")
    lines = []
    for name, r in results.items():
        error = f" ± {r['standard_error']:.2f}" if r["standard_error"] else ""
        lines.append((name, f"{r['perplexity']:.2f}{error}", f"{int(r['predictions']):,}"))
    print(markdown_table(("policy", "perplexity", "predictions"), lines))
    print("Next to the paper's Table 2 (400K tokens of PG-19, caches of 2048 or 4096)")
    models = {"SmolLM2-135M (here)": _ours(results), **paper()}
    lines = [(model, *[f"{v:,.2f}" for v in values]) for model, values in models.items()]
    print(markdown_table(("sinks", "0 (window)", *map(str, SINKS)), lines))


def draw_effects(results: dict[str, dict[str, float]], path: Path) -> None:
    """Left: our policies. Right: what window attention costs against 4 sinks, next to the paper's models."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    names = list(results)
    values = [results[name]["perplexity"] for name in names]
    errors = [results[name]["standard_error"] for name in names]
    colors = [COLORS[1] if name.startswith("window") else COLORS[0] for name in names]
    colors = [GREY if name in ("dense", "recompute") else c for name, c in zip(names, colors)]
    left.barh(names, values, xerr=errors, color=colors)
    left.invert_yaxis()
    for i, value in enumerate(values):
        left.annotate(
            f"{value:.1f}", (value, i), (3, 0), textcoords="offset points", va="center", fontsize=8
        )
    left.set_title(f"SmolLM2-135M, cache of {CACHE}: perplexity", loc="left", fontsize=9, color=INK)
    for i, (model, row) in enumerate({"SmolLM2-135M (here)": _ours(results), **paper()}.items()):
        ratio = np.array(row) / row[3]
        right.plot(range(5), ratio, marker="o", markersize=4, color=COLORS[i], label=model)
    right.set_yscale("log")
    right.set_xticks(range(5), ["0", *map(str, SINKS)])
    right.set_xlabel("sinks", fontsize=8)
    right.set_title(
        "perplexity over that with 4 sinks, with the paper's Table 2", loc="left", fontsize=9, color=INK
    )  # fmt: skip
    right.legend(fontsize=7, frameon=False)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=144, facecolor="white")
