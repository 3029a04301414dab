"""Job "sinks_speed": what a token costs, in milliseconds and bytes, for every policy and cache size.

window and sinks decode one token from a full cache; re-computation reads the last S + R tokens afresh for each. The workdir
gets speed.png, table.md, config.json, result.json and results.jsonl; measured.json, as it grows, is where a stopped job
goes on.
"""

import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from rich.progress import track

from common.config import build, check_choices
from common.plots import COLORS, INK
from common.results import markdown_table
from experiments.shared.clock import write_json
from experiments.shared.run import Run, job
from experiments.sinks.inputs import open_model
from sinks import cache, stream
from sinks.cache import CacheSpec
from sinks.config import ModelConfig
from sinks.loading import Model

log = logging.getLogger("triptych")
POLICIES = ("window", "sinks", "sinks_int8", "recompute")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      job: what is run, a key of experiments.jobs.JOBS.  name: the experiment's name, in rows and in the log.
      model: a name, a .gguf file, a safetensors folder or owner/name.
      dtype: type of weights and cache.  batch: streams side by side.
      sinks: number of sinks S.  cache_sizes: tokens in each cache, S + R.
      policies: "window", "sinks", "sinks_int8" or "recompute".
      tokens: tokens timed of each, or ten seconds of them; medians are reported.
    """

    job: str = "sinks_speed"
    name: str = "speed"
    model: str = "smollm2-135m"
    dtype: str = "float32"
    batch: int = 1
    sinks: int = 4
    cache_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    policies: tuple[str, ...] = POLICIES
    tokens: int = 20

    def __post_init__(self):
        check_choices(policies=self.policies, cache_sizes=self.cache_sizes)
        if unknown := set(self.policies) - set(POLICIES):
            raise ValueError(
                f"policies {sorted(unknown)} are unknown; known: {', '.join(POLICIES)}"
            )
        if self.batch < 1 or self.tokens < 1:
            raise ValueError(f"batch={self.batch}, tokens={self.tokens}: at least 1")
        for size in self.cache_sizes:
            self.spec("sinks", size)  # refuses what a cache cannot have

    def spec(self, policy: str, size: int) -> CacheSpec:
        sinks = 0 if policy == "window" else self.sinks
        return CacheSpec(sinks, size - sinks, self.dtype, int8=policy == "sinks_int8")


@job(Settings, only=("policies", "cache_sizes"))
def run(run: Run) -> int:
    """Runs the job; see experiments/launch.py for what it prints and returns."""
    settings, workdir = build(Settings, run.values), run.workdir
    path = workdir / "measured.json"
    kept = json.loads(path.read_text()) if path.exists() else {"ms": {}}
    model = open_model(settings.model, settings.dtype)
    model = model._replace(params=stream.prepare(model.params))
    run.begin(0)
    sweep = [(policy, size) for policy in settings.policies for size in settings.cache_sizes]
    measured: dict[str, float] = kept["ms"]
    log.info("%d settings, each compiled first", len(sweep))
    for policy, size in track(sweep, "measuring", transient=True):
        name = f"{policy} {size}"
        if name in measured:
            continue
        step = _recompute if policy == "recompute" else _decode
        measured[name] = 1e3 * _median(step(settings, model, policy, size), settings.tokens)
        write_json(path, kept)
        log.info("%s: %.1f ms", name, measured[name])
    ms = {(policy, size): measured[f"{policy} {size}"] for policy, size in sweep}
    held = {
        (policy, size): settings.spec(policy, size).nbytes(model.config, settings.batch)
        for policy, size in sweep
        if policy != "recompute"
    }
    metrics = {f"ms_per_token/{policy}/{size}": v for (policy, size), v in ms.items()}
    metrics |= {f"cache_bytes/{policy}/{size}": float(v) for (policy, size), v in held.items()}
    weights = sum(p.nbytes for p in jax.tree.leaves(model.params))
    metrics |= {"weight_bytes": float(weights)}
    rows = [
        [size]
        + [ms[policy, size] for policy in settings.policies]
        + [held[p, size] / 1e6 for p in settings.policies if p != "recompute"]
        for size in settings.cache_sizes
    ]
    header = ["cache", *(f"{p}, ms" for p in settings.policies)]
    header += [f"{p}, MB" for p in settings.policies if p != "recompute"]
    table = markdown_table(header, rows)
    (workdir / "table.md").write_text(table)
    log.info("ms per token of %d streams, and the cache's bytes:\n%s", settings.batch, table)
    draw_speed(settings, ms, workdir / "speed.png")
    run.finish(run.row(metrics, seeds=[0], steps=len(sweep), dtype=settings.dtype))
    return 0


def _decode(settings: Settings, model: Model, policy: str, size: int) -> Callable[[], None]:
    """One more token from a full cache."""
    stacked = isinstance(model.params["blocks"], dict)
    state = cache.init(model.config, settings.spec(policy, size), settings.batch, stacked=stacked)
    state = replace(state, length=state.length + 2 * size)
    token, key = jnp.zeros(settings.batch, jnp.int32), jax.random.key(0)

    def step() -> None:
        nonlocal state, token
        token, state = stream.decode_step(model.config, model.params, state, token, key)
        jax.block_until_ready(state)

    return step


def _recompute(settings: Settings, model: Model, policy: str, size: int) -> Callable[[], None]:
    """One more token from a fresh pass over `size` of them."""
    params = stream.prepare(model.params, stacked=True)
    tokens = jnp.zeros((settings.batch, size), jnp.int32)
    spec = CacheSpec(0, size, settings.dtype)
    return lambda: jax.block_until_ready(_last_logits(model.config, spec, params, tokens))


@partial(jax.jit, static_argnums=(0, 1))
def _last_logits(config: ModelConfig, spec: CacheSpec, params, tokens_BT: jax.Array) -> jax.Array:
    x_BTD = stream.hidden_from_start(config, params, spec, tokens_BT)
    return stream.unembed(config, params, x_BTD[:, -1:])


def _median(step: Callable[[], None], n: int) -> float:
    """Seconds of a step, of n or as many as ten seconds allow, but three at least."""
    times: list[float] = []
    for i in range(n + 2):
        if len(times) >= 3 and sum(times) > 10:
            break
        began = time.perf_counter()
        step()
        if i >= 2:  # the first compile
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def draw_speed(settings: Settings, ms: dict[tuple[str, int], float], path: Path) -> None:
    """Milliseconds per token against the cache's size, both logarithmic."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    ax = figure.subplots()
    for policy, color in zip(settings.policies, COLORS):
        values = [ms[policy, size] for size in settings.cache_sizes]
        ax.plot(settings.cache_sizes, values, marker="o", markersize=4, color=color, label=policy)
    ax.set(xscale="log", yscale="log", xlabel="tokens in the cache")
    ax.set_xticks(settings.cache_sizes, [str(s) for s in settings.cache_sizes], minor=False)
    ax.minorticks_off()
    ax.set_title(f"{settings.model}: ms per token", loc="left", fontsize=9, color=INK)
    ax.legend(fontsize=7, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=144, facecolor="white")
