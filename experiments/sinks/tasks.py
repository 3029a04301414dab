"""Jobs "sinks_streameval" and "sinks_qa_stream": how many questions in a stream are answered, under what policy.

The workdir gets rows.jsonl (one row for each policy and cache size; a job started again goes on after the last),
accuracy.png, config.json and result.json.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.config import ConfigError, build, check_choices
from common.plots import COLORS
from common.results import markdown_table
from common.writers import complete_lines, write_whole
from experiments.shared.run import Run, job
from experiments.sinks.inputs import open_model
from sinks import stream, tasks
from sinks.cache import CacheSpec
from sinks.loading import Model

log = logging.getLogger("triptych")
POLICIES = ("sinks", "window", "alone")


@dataclass(frozen=True)
class Settings:
    """What both jobs have.

    Attributes:
      job: what is run, a key of experiments.jobs.JOBS.  name: the experiment's name, in rows and in the log.
      model: a name, a .gguf file, a safetensors folder or owner/name.
      policies: "sinks" or "window"; of questions also "alone".
      cache_sizes: tokens in each cache, S + R.  sinks: number of sinks S.
      samples: streams, each with a text or an order of its own.
      chunk: tokens at a time.  seed: seed of the streams.
    """

    job: str
    name: str
    model: str = "smollm2-135m"
    policies: tuple[str, ...] = ("sinks", "window")
    cache_sizes: tuple[int, ...] = (512, 1024)
    sinks: int = 4
    samples: int = 1
    chunk: int = 512
    seed: int = 0

    def __post_init__(self):
        check_choices(policies=self.policies, cache_sizes=self.cache_sizes)
        known = POLICIES[:2] if self.job == "sinks_streameval" else POLICIES
        if odd := [p for p in self.policies if p not in known]:
            raise ValueError(f"policies {', '.join(odd)}: known are {', '.join(known)}")
        if min(self.samples, self.chunk) < 1:
            raise ValueError(f"samples={self.samples}, chunk={self.chunk}: at least 1")
        self.runs()  # refuses what a cache cannot have

    def runs(self) -> dict[str, CacheSpec | None]:
        """The specs to try by their names, as the paper writes them: "4+1020" is S + R. None: each question alone."""
        specs = {}
        for policy in self.policies:
            if policy == "alone":
                specs["alone"] = None
                continue
            for size in self.cache_sizes:
                sinks = self.sinks if policy == "sinks" else 0
                specs[f"{sinks}+{size - sinks}"] = CacheSpec(sinks, size - sinks)
        return specs


@dataclass(frozen=True)
class StreamEvalSettings(Settings):
    """See sinks.tasks.StreamEval.

    Attributes:
      queries: questions in each text.  every: lines between two questions.
      distances: how many lines back is asked for, in turn.
      digits: digits of a register's value.  keys: what registers are called by, "names" or "lines".
    """

    job: str = "sinks_streameval"
    name: str = "streameval"
    samples: int = 2
    queries: int = 60
    every: int = 4
    distances: tuple[int, ...] = (1, 2, 5, 10, 20, 40)
    digits: int = 3
    keys: str = "names"


@dataclass(frozen=True)
class QASettings(Settings):
    """Multiple-choice questions.

    Attributes:
      questions: "embedded", or a JSONL file, ARC's own among them.
      count: questions in each stream.
    """

    job: str = "sinks_qa_stream"
    name: str = "qa_stream"
    policies: tuple[str, ...] = ("alone", "sinks", "window")
    cache_sizes: tuple[int, ...] = (256, 1024)
    questions: str = "embedded"
    count: int = 148


Texts = list[tuple[np.ndarray, tuple[tasks.Answer, ...]]]  # token ids and answers


PARTS = ("policies", "cache_sizes", "sinks")  # the settings that only say which rows there are


@job(StreamEvalSettings, only=PARTS)
def run_streameval(run: Run) -> int:
    """Runs the job; see experiments/launch.py for what it prints and returns."""
    s = build(StreamEvalSettings, run.values)
    try:
        maker = tasks.StreamEval(s.queries, s.every, s.distances, s.digits, s.keys)
    except ValueError as error:
        raise ConfigError(f"config: {error}") from error
    made = [maker.task(s.seed + i) for i in range(s.samples)]
    return _run(s, run, lambda alone: made, "lines back")


@job(QASettings, only=PARTS)
def run_qa_stream(run: Run) -> int:
    """Runs the job; see experiments/launch.py for what it prints and returns."""
    s = build(QASettings, run.values)
    if s.count < 1:
        raise ConfigError(f"config.count={s.count}: at least 1")
    try:
        questions = tasks.read_questions(s.questions)
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.questions: {error}") from error

    def make(alone: bool) -> list[tasks.Task]:
        if alone:
            return tasks.qa_alone(questions, s.count, s.seed)
        return [tasks.qa_stream(questions, s.count, s.seed + i) for i in range(s.samples)]

    return _run(s, run, make, "time that a question is asked")


def _run(s: Settings, run: Run, make: Callable[[bool], list[tasks.Task]], kinds: str) -> int:
    workdir = run.workdir
    rows = _rows_before(workdir)
    model = open_model(s.model)
    for spec in filter(None, s.runs().values()):
        stream.check_spec(model.config, spec)
    run.begin(0)
    for name, spec in s.runs().items():
        if name in {row["policy"] for row in rows}:
            continue
        texts = [tasks.tokenize(model.tokenizer, task) for task in make(spec is None)]
        log.info("%s: %d tokens; compiling ...", name, sum(len(ids) for ids, _ in texts))
        rows.append({"policy": name} | _answer(model, spec, texts, s.chunk, name))
        write_whole(workdir / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    rows = [row for name in s.runs() for row in rows if row["policy"] == name]
    draw_accuracy(rows, workdir / "accuracy.png", f"{s.name}, {Path(s.model).name}", kinds)
    metrics = {f"accuracy/{row['policy']}": row["right"] / row["asked"] for row in rows}
    for row in rows:
        metrics |= {f"accuracy/{row['policy']}/{k}": n / of for k, (n, of) in row["kinds"].items()}
    steps = sum(row["tokens"] for row in rows)
    run.finish(run.row(metrics, seeds=[s.seed], steps=steps, dtype="float32"))
    header = ("policy", "right", "asked", "accuracy %", "standard error", "tokens/s")
    log.info(markdown_table(header, [_table_row(row) for row in rows]))
    return 0


def _rows_before(workdir: Path) -> list[dict[str, Any]]:
    """The rows of an earlier start in this workdir."""
    if not (workdir / "rows.jsonl").exists():
        return []
    return [json.loads(line) for line in complete_lines(workdir / "rows.jsonl")]


def _answer(
    model: Model, spec: CacheSpec | None, texts: Texts, chunk: int, name: str
) -> dict[str, Any]:
    """Streams the texts and counts right answers, by kind too. With no spec, each text is short: all of it is seen."""
    if spec is None:
        longest = max(len(ids) for ids, _ in texts)
        spec, chunk = CacheSpec(0, longest), longest
        groups = [texts[i : i + 8] for i in range(0, len(texts), 8)]
    else:
        groups = [texts]
    began, right = time.perf_counter(), []
    for group in groups:
        ids = [ids for ids, _ in group]
        what = f"{name}, {sum(map(len, ids))} tokens" if len(groups) == 1 else ""
        hits = tasks.greedy_hits(model.config, model.params, spec, ids, chunk=chunk, what=what)
        right += [tasks.exact_matches(hit, answers) for hit, (_, answers) in zip(hits, group)]
    seconds = time.perf_counter() - began
    kind = np.array([answer.kind for _, answers in texts for answer in answers])
    matches = np.concatenate(right)
    counts = {
        int(k): (int(matches[kind == k].sum()), int((kind == k).sum())) for k in np.unique(kind)
    }
    return {
        "right": int(matches.sum()),
        "asked": len(matches),
        "kinds": counts,
        "tokens": sum(len(ids) for ids, _ in texts),
        "seconds": seconds,
    }


def _error(right: int, asked: int) -> float:
    """The standard error of right / asked, with one answer of each kind added so that it is never 0."""
    p = (right + 1) / (asked + 2)
    return (p * (1 - p) / (asked + 2)) ** 0.5


def _table_row(row: dict[str, Any]) -> tuple:
    right, asked = row["right"], row["asked"]
    percent = round(100 * right / asked, 1), round(100 * _error(right, asked), 1)
    return row["policy"], right, asked, *percent, round(row["tokens"] / row["seconds"])


def draw_accuracy(rows: Sequence[dict[str, Any]], path: Path, title: str, kinds: str) -> None:
    """Accuracy of every policy: against the kind of question where there are several, else as bars."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.subplots()
    several = max(len(row["kinds"]) for row in rows) > 1
    for x, (row, color) in enumerate(zip(rows, COLORS * len(rows))):
        counts = row["kinds"] if several else {x: (row["right"], row["asked"])}
        at = [int(k) for k in counts]
        height = [100 * right / asked for right, asked in counts.values()]
        error = [100 * _error(*count) for count in counts.values()]
        style = {"marker": "o", "ms": 4, "lw": 1.5} if several else {"fmt": "o", "ms": 7}
        ax.errorbar(at, height, error, color=color, capsize=3, label=row["policy"], **style)
    if several:
        ax.set_xlabel(kinds)
        ax.legend(frameon=False, fontsize=8)
    else:
        ax.set_xticks(range(len(rows)), [row["policy"] for row in rows])
        ax.margins(x=0.2)
    ax.set(ylim=(0, None), ylabel="exact match (%)", title=title)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
