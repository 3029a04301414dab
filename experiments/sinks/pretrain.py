"""Job "sinks_pretrain": language models with and without a sink of their own, and what each streams like afterwards.

The workdir gets a folder per variant (metrics.jsonl, curves.png, checkpoints/), pretrain.png, config.json, result.json, and
table.md, laid out like the paper's Table 3. After an interruption it continues where it was.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from common.checkpoint import CheckpointSpec, read_meta
from common.config import ConfigError, build, check_choices
from common.data import LoaderSpec, array_source, fingerprint, train_batches
from common.distributed import require_same
from common.mesh import MeshSpec, make_mesh
from common.optim import OptimSpec
from common.plots import COLORS
from common.results import markdown_table
from common.sharding import batch_sharding, rows_held, to_host
from common.train_loop import TrainSpec
from common.writers import read_metrics
from experiments.shared.learned_optim import optimizer
from experiments.shared.run import Run, job
from experiments.shared.training import train_in
from sinks import maps, perplexity, text
from sinks.cache import CacheSpec
from sinks.config import ModelConfig
from sinks.perplexity import Tally
from sinks.policies import Cached
from sinks.recipe import LanguageModel, decays, variant

log = logging.getLogger("triptych")
BYTES = 256  # the vocabulary


@dataclass(frozen=True)
class DataSettings:
    """The text.

    Attributes:
      text: "python-topics", "embedded", a file, or a folder of .txt files; read as bytes.
      length: bytes of a sample.
      held_out: last part of each text, as a share of it, for evaluation.
    """

    text: str = "python-topics"
    length: int = 256
    held_out: float = 0.1

    def __post_init__(self):
        if self.length < 8 or not 0 < self.held_out < 1:
            raise ValueError(
                f"length={self.length} must be at least 8, held_out={self.held_out} in (0, 1)"
            )


@dataclass(frozen=True)
class ModelSettings:
    """A GPT-NeoX.

    Attributes:
      width: of the residual stream.  depth: number of blocks.  heads: attention heads of a block.
      mlp_dim: inner width of the MLP.
      rope_fraction: share of a head's dimensions that are rotated.
    """

    width: int = 192
    depth: int = 6
    heads: int = 6
    mlp_dim: int = 768
    rope_fraction: float = 0.25


@dataclass(frozen=True)
class EvaluateSettings:
    """How the trained models stream.

    Attributes:
      cache_size: tokens in the cache, S + R.  sinks: numbers of sinks S.
      tokens: bytes of the held-out text that are streamed.  chunk: bytes at a time.
    """

    cache_size: int = 256
    sinks: tuple[int, ...] = (0, 1, 2, 4)
    tokens: int = 20_000
    chunk: int = 512

    def __post_init__(self):
        check_choices(sinks=self.sinks)

    def specs(self) -> dict[str, CacheSpec]:
        """The caches, by their names in the paper's Table 3: "1+255"."""
        return {f"{s}+{self.cache_size - s}": CacheSpec(s, self.cache_size - s) for s in self.sinks}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of the job.

    Attributes:
      job: what is run, a key of experiments.jobs.JOBS.  name: the experiment's name, in rows and in the log.
      variants: names of sinks.recipe.SINK_TOKENS, each a model of its own.
      compute: type of the products' operands, "float32" or "bfloat16".
    """

    job: str = "sinks_pretrain"
    name: str = "pretrain"
    variants: tuple[str, ...] = ("vanilla", "zero", "logit", "token")
    data: DataSettings
    model: ModelSettings
    optim: OptimSpec
    compute: str = "float32"
    train: TrainSpec
    mesh: MeshSpec
    evaluate: EvaluateSettings

    def __post_init__(self):
        check_choices(variants=self.variants)

    def recipe(self, name: str) -> LanguageModel:
        m = self.model
        if m.width % m.heads:
            raise ValueError(f"model.width={m.width} must be a multiple of model.heads={m.heads}")
        neox = ModelConfig(
            family="neox",
            vocab_size=BYTES,
            width=m.width,
            depth=m.depth,
            heads=m.heads,
            kv_heads=m.heads,
            head_dim=m.width // m.heads,
            mlp_dim=m.mlp_dim,
            max_positions=self.data.length,
            rope_fraction=m.rope_fraction,
            activation="gelu",
            attention_bias=True,
            mlp_bias=True,
            parallel_residual=True,
        )
        self.optim.lr_schedule(self.train.steps)  # refuses a warm-up that does not fit
        tx, log_tx = optimizer(self.optim, self.train.steps, decays)
        return variant(name, neox, tx=tx, log=log_tx, compute=self.compute)


@job(Settings, only=("variants", "evaluate"))
def run(run: Run) -> int:
    """Runs the job; see experiments/launch.py for what it prints and returns."""
    settings, workdir = build(Settings, run.values), run.workdir
    try:
        recipes = {name: settings.recipe(name) for name in settings.variants}
        settings.evaluate.specs()
        mesh = make_mesh(settings.mesh)
        settings.train.check_mesh(mesh)
        samples, held_out = split(text.documents(settings.data.text), settings.data)
        require_same({"the text": _digest(samples), "the held-out text": _digest(held_out)})
    except (ValueError, OSError) as error:
        raise ConfigError(f"config: {error}") from error
    # It alone writes. All train, and all measure: they are then ready for the next variant at the same time.
    first = jax.process_index() == 0
    run.begin(0)
    metrics, table, seconds = {}, [], Counter()
    for name, recipe in recipes.items():
        log.info(
            "%s: %d samples of %d bytes, %d steps",
            name,
            len(samples),
            settings.data.length,
            settings.train.steps,
        )
        params = _train(recipe, settings, mesh, samples, workdir / name)
        log.info(
            "%s: streaming %d bytes of held-out text",
            name,
            min(len(held_out), settings.evaluate.tokens),
        )
        found = measure(recipe, params, settings.evaluate, held_out)
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
        seconds.update(read_meta(workdir / name / "checkpoints").get("seconds", {}))
        table.append((name, *found.values()))
    if not first:
        return 0
    header = ("variant", *found)
    (workdir / "table.md").write_text(markdown_table(header, table))
    draw_variants(workdir, list(recipes), metrics, list(settings.evaluate.specs()))
    log.info("perplexity per byte of held-out text\n%s", markdown_table(header, table))
    log.info("seconds: %s", ", ".join(f"{k} {v:.1f}" for k, v in seconds.items()))
    row = run.row(
        metrics, seeds=[settings.train.seed], steps=settings.train.steps,
        mesh=dict(mesh.shape), dtype=settings.compute, seconds=seconds,
    )  # fmt: skip
    run.finish(row)
    return 0


def split(documents: list[text.Document], data: DataSettings) -> tuple[np.ndarray, np.ndarray]:
    """Samples [n, length] from the front of each text, and its last part as one stream [N]; bytes, int32."""
    samples, held_out = [], []
    for document in documents:
        ids = np.frombuffer(document.text.encode(), np.uint8).astype(np.int32)
        cut = int(len(ids) * (1 - data.held_out))
        rows = cut // data.length
        samples.append(ids[: rows * data.length].reshape(rows, data.length))
        held_out.append(ids[cut:])
    whole = np.concatenate(samples)
    if not len(whole):
        raise ValueError(f"data.length={data.length}: no text of {data.text!r} is that long")
    return whole, np.concatenate(held_out)


def _digest(ids: np.ndarray) -> str:
    return f"{len(ids)} long, SHA-256 {hashlib.sha256(ids.tobytes()).hexdigest()[:12]}"


def _train(
    recipe: LanguageModel, settings: Settings, mesh: Mesh, samples: np.ndarray, workdir: Path
) -> Any:
    """Trains one variant in its own folder, or goes on with it; its parameters."""
    spec = settings.train
    source = array_source(tokens=samples)
    held = rows_held(batch_sharding(mesh), spec.batch)
    loader = LoaderSpec(spec.batch, spec.seed, held=held)
    workdir.mkdir(parents=True, exist_ok=True)

    state, _ = train_in(
        workdir,
        recipe,
        spec,
        mesh=mesh,
        host_batches=lambda start: train_batches(source, loader, start_step=start),
        meta={"data": fingerprint(source, loader)},
        writer={"items_per_step": samples.shape[1] * spec.batch, "unit": "bytes"},
        checkpoint=CheckpointSpec(1),
    )
    return to_host(state.params)


def measure(
    recipe: LanguageModel, params: Any, settings: EvaluateSettings, held_out: np.ndarray
) -> dict[str, float]:
    """Perplexity of the stream under every spec, once the cache is full, and the first token's share of attention."""
    params = jax.tree.map(jnp.asarray, params)
    ids = np.concatenate([np.array(recipe.front, np.int32), held_out[: settings.tokens]])
    found = {}
    for name, spec in settings.specs().items():
        tally = Tally()
        for piece in perplexity.score(
            recipe.model, params, Cached(spec), ids, chunk=settings.chunk
        ):
            late = piece.first + np.flatnonzero(piece.scored) >= settings.cache_size
            tally += Tally.of(piece.nll[piece.scored][late])
        found[name] = tally.perplexity
    T = min(128, len(ids))
    seen = maps.attention_maps(recipe.model, params, CacheSpec(0, T), jnp.asarray(ids[None, :T]))
    found["sink share"] = float(maps.sink_share(seen, max(1, recipe.sink_tokens), T // 4).mean())
    return found


def draw_variants(
    workdir: Path, names: list[str], metrics: Mapping[str, float], specs: list[str]
) -> None:
    """Training loss, and perplexity against the number of sinks that the stream keeps, for every variant."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, color in zip(names, COLORS * len(names)):
        rows = [row for row in read_metrics(workdir / name / "metrics.jsonl") if "loss" in row]
        left.plot(
            [row["step"] for row in rows],
            [row["loss"] for row in rows],
            color=color,
            lw=1.2,
            label=name,
        )
        right.plot(
            specs,
            [metrics[f"{name}/{spec}"] for spec in specs],
            color=color,
            marker="o",
            ms=4,
            label=name,
        )
    left.set(xlabel="step", ylabel="nats per byte", title="training loss")
    right.set(xlabel="cache", ylabel="perplexity per byte", title="held-out stream", yscale="log")
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(workdir / "pretrain.png", dpi=120)
