"""Job "sinks_perplexity": the running perplexity of a long text, for a sweep of policies, cache sizes and sinks.

The workdir gets one folder per setting with metrics.jsonl (a row per chunk) and checkpoints, perplexity.png, a table in
table.md, and results.jsonl (a row per setting). Interrupted, each setting goes on in the middle of its stream; the picture
shows how far it came.
"""

import contextlib
import logging
import math
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.checkpoint import Checkpointer
from common.config import ConfigError, build, check_choices
from common.distributed import PreemptionGuard
from common.plots import curves
from common.results import ResultRow, config_hash, markdown_table, read_rows
from common.train_loop import Preempted
from common.writers import make_writer, read_metrics
from experiments.shared.old_settings import as_before
from experiments.shared.run import NOTHING, Run, job
from experiments.sinks.inputs import open_model, read_documents
from sinks import params, perplexity, stream, text
from sinks.loading import Model
from sinks.perplexity import Tally
from sinks.policies import Cached, CachePolicy, make_policy

log = logging.getLogger("triptych")


@dataclass(frozen=True)
class Settings:
    """A sweep over policies, cache sizes and sinks.

    Attributes:
      job: what is run, a key of experiments.jobs.JOBS.  name: the experiment's name, in rows and in the log.
      model: a name, a .gguf file, a safetensors folder or owner/name.
      dtype: type of weights and cache; sums are float32.  int8: whether the ring is kept in 8 bits.
      text: "embedded", a file, or a folder of .txt files, read in order of their names as one stream.
      tokens: of the text, how many are read; None takes all.
      bos: whether the model's first token stands before each document.
      policies: names of sinks.policies.POLICIES.
      cache_sizes: tokens in each cache, S + R.  sinks: numbers of sinks S.
      sample: predictions per chunk of policy "recompute"; None takes all, at cache_size times the work.
      block: tokens of a turn, of policy "evict_for_space": room is made for all of it; below cache_size - sinks.
      chunk: tokens at a time; but for `sample`, no result depends on it.
      save_every: chunks between checkpoints.  seed: seed of the places that `sample` takes.
    """

    job: str = "sinks_perplexity"
    name: str = "perplexity"
    model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    int8: bool = False
    text: str = "embedded"
    tokens: int | None = None
    bos: bool = True
    policies: tuple[str, ...] = ("window", "sinks")
    cache_sizes: tuple[int, ...] = (1024,)
    sinks: tuple[int, ...] = (1, 2, 4, 8)
    sample: int | None = None
    block: int = 256
    chunk: int = 1024
    save_every: int = 32
    seed: int = 0

    def __post_init__(self):
        check_choices(policies=self.policies, cache_sizes=self.cache_sizes, sinks=self.sinks)
        for name in ("tokens", "sample", "chunk", "save_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}: at least 1")
        list(self.sweep(10))  # refuses unknown policies and impossible sizes

    def sweep(self, tokens: int) -> Iterator[tuple[str, CachePolicy]]:
        """Every setting by name, such as "sinks 4+1020"."""
        spec = {"dtype": self.dtype, "int8": self.int8}
        for kind in self.policies:
            if kind == "dense":
                yield "dense", make_policy("dense", cache_size=tokens, **spec)
                continue
            for size in self.cache_sizes:
                if kind == "recompute":
                    yield (
                        f"recompute {size}",
                        make_policy(kind, cache_size=size, sample=self.sample),
                    )
                    continue
                for sinks in (0,) if kind == "window" else self.sinks:
                    policy = make_policy(
                        kind, cache_size=size, sinks=sinks, block=self.block, **spec
                    )
                    yield f"{kind} {sinks}+{size - sinks}", policy


@job(Settings, only=("policies", "cache_sizes", "sinks"))
def run(run: Run) -> int:
    """Runs the job; see experiments/launch.py for what it prints and returns."""
    settings, workdir = build(Settings, run.values), run.workdir
    documents = read_documents(settings.text)
    model = open_model(settings.model, settings.dtype)
    ids = text.tokens(model.tokenizer, documents, bos=settings.bos)
    tokens = np.concatenate(ids)[: settings.tokens]
    if len(tokens) < max(2, settings.tokens or 0):
        raise ConfigError(f"config.tokens={settings.tokens}: the text has {len(tokens)}")
    inputs = {
        "text_crc32": zlib.crc32(tokens.tobytes()),
        "weights_crc32": params.fingerprint(model.params),
    }
    for folder, row in _done_rows(run):
        _check_same(run, folder, row.metrics, inputs)
    run.begin(0)
    model = model._replace(params=stream.prepare(model.params, stacked=True))
    for name, policy in settings.sweep(len(tokens)):
        folder = workdir / name.replace(" ", "_")
        if run.rows({}, folder, name=name, block=NOTHING):
            log.info("%s: done before, see %s", name, folder / "result.json")
            continue
        if isinstance(policy, Cached) and name != "dense":
            stream.check_spec(model.config, policy.spec)
        try:
            with run.part(folder.name) as clock:
                found = _run_one(settings, run, name, policy, model, tokens, folder, inputs)
        finally:
            draw_perplexity(workdir)
        metrics = _metrics(*found) | {k: float(crc32) for k, crc32 in inputs.items()}
        if isinstance(policy, Cached):
            metrics["cache_bytes"] = float(policy.spec.nbytes(model.config))
        row = run.row(
            metrics, part={"setting": name}, seeds=[settings.seed], steps=found[0].count,
            dtype=settings.dtype, wall_seconds=clock.seconds,
        )  # fmt: skip
        run.finish(row, folder)
        log.info("%s: perplexity %.3f over %d tokens", name, found[0].perplexity, found[0].count)
    write_table(run)
    return 0


def _done_rows(run: Run) -> Iterator[tuple[Path, ResultRow]]:
    """Folder and result row of every setting that was measured with this config."""
    for name, folder in _settings_of(run.workdir).items():
        for row in read_rows(folder / "results.jsonl"):
            if run.owns(row, part=True, name=name, block=NOTHING):
                yield folder, row


def _check_same(run: Run, folder: Path, saved: Mapping[str, Any], inputs: dict[str, int]) -> None:
    """Raises ConfigError where a text or weights have changed under the same name since `saved`, which may lack them."""
    for key, setting in (("text_crc32", "text"), ("weights_crc32", "model")):
        if key in saved and saved[key] != inputs[key]:
            raise ConfigError(
                f"config.{setting}={run.values[setting]}: the {key.partition('_')[0]} there is not what {folder} was "
                "measured with: take another --workdir, or remove that folder"
            )


def _check_stream(
    run: Run, folder: Path, saved: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """Raises ConfigError where a saved stream is of another setting, config or text."""
    # Older versions put other settings into the hash.
    former = {k: v for k, v in as_before(run.values).items() if k != "block"} | {"save_every": 0}
    if {k: saved[k] for k in meta} not in (meta, {**meta, "config": config_hash(former)}):
        raise ConfigError(
            f"{folder} holds a stream of another config or text: take another --workdir, or remove it"
        )


def _run_one(
    settings: Settings,
    run: Run,
    name: str,
    policy: CachePolicy,
    model: Model,
    tokens: np.ndarray,
    folder: Path,
    inputs: dict[str, int],
) -> tuple[Tally, Tally, float]:
    """Streams the text under one policy: of all tokens, of those from a full cache, and seconds.

    Raises:
      Preempted: asked to stop, with the state saved.
    """
    meta = {"setting": name, "config": run.part_hash, "tokens": len(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    with Checkpointer(folder / "checkpoints") as saver, PreemptionGuard() as guard:
        first, state, tally, filled, seconds = 0, None, Tally(), Tally(), 0.0
        restored = saver.restore(jax.eval_shape(lambda: policy.init(model.config)))
        if restored is not None:
            state, saved = restored
            _check_stream(run, folder, saved, meta)
            _check_same(run, folder, saved, inputs)
            first, seconds = saved["place"], saved["seconds"]
            tally, filled = Tally(**saved["tally"]), Tally(**saved["filled"])
            log.info("%s: goes on at token %d of %d", name, first, len(tokens))
        restored_step = first if first else -1
        writer = make_writer(
            folder,
            len(tokens) - 1,
            restored_step=restored_step,
            unit="tokens",
            headline="perplexity",
        )
        size = policy.spec.capacity if isinstance(policy, Cached) else getattr(policy, "length", 0)
        pieces = perplexity.score(
            model.config, model.params, policy, tokens, chunk=settings.chunk, first=first, state=state, seed=settings.seed
        )  # fmt: skip
        log.info("%s: %d tokens; compiling ...", name, len(tokens) - first)
        then = time.perf_counter()
        with contextlib.closing(writer):
            for i, piece in enumerate(pieces, start=1):
                places = piece.first + np.flatnonzero(piece.scored)
                chunk = Tally.of(nll := piece.nll[piece.scored])
                tally += chunk
                filled += Tally.of(nll[places >= size])
                now = time.perf_counter()
                seconds, took, then = seconds + now - then, now - then, now
                scalars = {"perplexity": tally.perplexity, "chunk_perplexity": chunk.perplexity}
                rate = (piece.next - piece.first) / took
                writer.write(piece.next, scalars | {"tokens_per_second": rate})
                stop = guard.reached(i)
                if stop or i % settings.save_every == 0:
                    progress = {"place": piece.next, "seconds": seconds}
                    sums = {"tally": asdict(tally), "filled": asdict(filled)}
                    saver.save(piece.next, piece.state, meta | inputs | progress | sums, wait=stop)
                if stop and piece.next < len(tokens) - 1:
                    raise Preempted(f"{name}: stopped at token {piece.next}; the state is saved")
    return tally, filled, seconds


def _metrics(tally: Tally, filled: Tally, seconds: float) -> dict[str, float]:
    """`filled`: of the tokens that were predicted from a full cache."""
    return {
        "perplexity": tally.perplexity,
        "perplexity_filled": filled.perplexity,
        "nats": tally.mean,
        "standard_error": tally.standard_error,
        "tokens": float(tally.count),
        "tokens_per_second": tally.count / seconds if seconds else 0.0,
    }


def _settings_of(workdir: Path) -> dict[str, Path]:
    found = sorted(workdir.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    return {path.parent.name.replace("_", " "): path.parent for path in found}


def draw_perplexity(workdir: Path) -> None:
    """perplexity.png: running perplexity, and each chunk's own, one line per setting."""
    rows: list[dict[str, float]] = []
    names = _settings_of(workdir)
    for name, folder in names.items():
        for row in read_metrics(folder / "metrics.jsonl"):
            running = {f"{name}": row["perplexity"], f"{name} ": row["chunk_perplexity"]}
            rows.append({"step": row["step"], **running})
    groups = {
        "perplexity so far": list(names),
        "perplexity of each chunk": [f"{n} " for n in names],
    }
    curves(rows, workdir / "perplexity.png", groups)


def write_table(run: Run) -> str:
    """table.md from the result rows of every setting that was measured with this config."""
    header = [
        "setting",
        "perplexity",
        "with a full cache",
        "± nats",
        "tokens",
        "tokens/s",
        "cache MB",
    ]
    cells = [
        [
            row.overrides.get("setting", row.config),
            row.metrics["perplexity"],
            filled if math.isfinite(filled := row.metrics["perplexity_filled"]) else None,
            row.metrics["standard_error"],
            int(row.metrics["tokens"]),
            row.metrics["tokens_per_second"],
            row.metrics["cache_bytes"] / 1e6 if "cache_bytes" in row.metrics else None,
        ]
        for _, row in _done_rows(run)
    ]
    table = markdown_table(header, cells)
    (run.workdir / "table.md").write_text(table)
    log.info("\n%s", table)
    return table
