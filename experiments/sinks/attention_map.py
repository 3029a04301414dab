"""Job "sinks_attention_map": the mean attention of every layer and head, as pictures.

The workdir gets attention.png (the share of the first token per layer and head, and the maps of some layers), heads.png (a
map of every head), maps.npz, config.json and result.json. Pictures show the first tokens only, so that one is wide enough
to be seen.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from common.config import ConfigError, build
from experiments.shared.run import Run, job
from experiments.sinks.inputs import open_model, read_documents
from sinks import text
from sinks.cache import CacheSpec
from sinks.loading import Model
from sinks.maps import Maps, attention_maps, sink_share
from sinks.progress import track
from sinks.text import Document

log = logging.getLogger("triptych")
AT_ONCE = 4  # texts per forward pass
FAINTEST = 1e-4  # attention below this is drawn as this
SHOWN, TILE = 40, 24  # tokens of a map in attention.png, and in heads.png


@dataclass(frozen=True)
class Settings:
    """What is looked at.

    Attributes:
      job: what is run, a key of experiments.jobs.JOBS.  name: the experiment's name, in rows and in the log.
      model: a name, a .gguf file, a safetensors folder or owner/name.
      text: "embedded", "python-topics", a file, or a folder of .txt files.
      texts: stretches of text, taken at even distances from all of it.  tokens: tokens of each.
      bos: whether each begins with the model's first token.
      sinks: number of sinks S of the stream.
      recent: number of recent tokens R of the stream; None takes all, which is dense attention.
    """

    job: str = "sinks_attention_map"
    name: str = "attention_map"
    model: str = "smollm2-135m"
    text: str = "embedded"
    texts: int = 16
    tokens: int = 128
    bos: bool = False
    sinks: int = 0
    recent: int | None = None

    def __post_init__(self):
        if self.texts < 1 or self.tokens < max(8, self.sinks + 2):
            raise ValueError(
                f"texts={self.texts}, tokens={self.tokens}: at least 1, and 8 or sinks + 2"
            )
        _ = self.spec  # refuses what a cache cannot have

    @property
    def spec(self) -> CacheSpec:
        return CacheSpec(self.sinks, self.tokens if self.recent is None else self.recent)


@job(Settings)
def run(run: Run) -> int:
    """Runs the job; see experiments/launch.py for what it prints and returns."""
    settings, workdir = build(Settings, run.values), run.workdir
    spec = settings.spec
    documents = read_documents(settings.text)
    model = open_model(settings.model)
    tokens_BT = _stretches(settings, model, documents)
    run.begin()

    total, batches = None, np.array_split(tokens_BT, -(-len(tokens_BT) // AT_ONCE))
    for batch in track(batches, "attention"):
        maps = attention_maps(model.config, model.params, spec, jnp.asarray(batch))
        weighed = [np.asarray(x, np.float64) * len(batch) / len(tokens_BT) for x in maps]
        total = weighed if total is None else [a + b for a, b in zip(total, weighed)]
    assert total is not None
    maps = Maps(*total)

    first = max(4, settings.sinks)
    share_LH = np.asarray(sink_share(maps, 1, first))
    next_LH = np.asarray(sink_share(maps, 4, first)) - share_LH
    np.savez_compressed(
        workdir / "maps.npz", **{k: v.astype(np.float32) for k, v in maps._asdict().items()}
    )
    draw_maps(maps, share_LH, workdir / "attention.png", _title(settings))
    draw_heads(maps, workdir / "heads.png")
    metrics = {
        "first_token_share": share_LH.mean(),
        "tokens_2_to_4_share": next_LH.mean(),
        **{f"first_token_share_layer_{i}": share for i, share in enumerate(share_LH.mean(1))},
    }
    run.finish(run.row(metrics, seeds=[0], steps=len(tokens_BT), dtype="float32"))
    log.info(
        "the first token takes %.0f %% of the attention of tokens %d to %d (tokens 2 to 4: %.1f %%), layer by layer %s",
        100 * metrics["first_token_share"], first + 1, settings.tokens, 100 * metrics["tokens_2_to_4_share"],
        " ".join(f"{100 * x:.0f}" for x in share_LH.mean(1)),
    )  # fmt: skip
    log.info("wrote %s and %s", workdir / "attention.png", workdir / "heads.png")
    return 0


def _stretches(settings: Settings, model: Model, documents: list[Document]) -> np.ndarray:
    """`texts` stretches of `tokens` tokens, [B, T], at even distances in all of the text."""
    start = [model.tokenizer.bos_id] if settings.bos and model.tokenizer.bos_id is not None else []
    ids = np.concatenate(text.tokens(model.tokenizer, documents, bos=False))
    length = settings.tokens - len(start)
    if len(ids) < settings.texts * length:
        raise ConfigError(
            f"config.texts={settings.texts} of {settings.tokens} tokens: {settings.text} has {len(ids)} tokens"
        )
    begins = np.linspace(0, len(ids) - length, settings.texts).astype(int)
    return np.stack([np.concatenate([start, ids[i : i + length]]) for i in begins]).astype(np.int32)


def _title(settings: Settings) -> str:
    seen = (
        f"{settings.sinks} sinks + {settings.recent} recent"
        if settings.recent
        else "dense attention"
    )
    model = Path(settings.model).name
    return f"{model}, {seen}, mean over {settings.texts} stretches of {settings.tokens} tokens"


def draw_maps(maps: Maps, share_LH: np.ndarray, path: Path, title: str) -> None:
    """The share of the first token per layer and head [L, H], and eight layers' maps, averaged over heads."""
    L = len(share_LH)
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 2.6)).flat
    ax = left.subplots()
    image = ax.imshow(100 * share_LH, aspect="auto", cmap="magma", vmin=0, vmax=100)
    ax.set(xlabel="head", ylabel="layer", title="attention on the first token (%)")
    left.colorbar(image, ax=ax)
    layers = np.unique(np.linspace(0, L - 1, 8).round().astype(int))
    axes = right.subplots(2, 4).flat
    weight_LTT = np.maximum(maps.weight_LHTT[..., :SHOWN, :SHOWN].mean(1), FAINTEST)
    for layer, ax in zip(layers, axes):
        image = ax.imshow(weight_LTT[layer], cmap="magma", norm=LogNorm(FAINTEST, 1))
        ax.set_title(f"layer {layer}", fontsize=9)
        ax.tick_params(labelsize=7)
    for ax in list(axes):  # the panels that are left
        ax.set_axis_off()
    right.supxlabel("attended token", fontsize=9)
    right.supylabel("query", fontsize=9)
    right.colorbar(image, ax=list(right.axes), fraction=0.03)
    figure.savefig(path, dpi=120)


def draw_heads(maps: Maps, path: Path) -> None:
    """Every head's map: layers from top to bottom, heads from left to right."""
    L, H, T, _ = maps.weight_LHTT.shape
    n = min(T, TILE)
    sheet = np.full((L * (n + 2), H * (n + 2)), np.nan)
    for i in range(L):
        for h in range(H):
            y, x = i * (n + 2), h * (n + 2)
            sheet[y : y + n, x : x + n] = np.maximum(maps.weight_LHTT[i, h, :n, :n], FAINTEST)
    figure = Figure(
        figsize=(sheet.shape[1] / 40 + 0.6, sheet.shape[0] / 40 + 0.4), layout="constrained"
    )
    ax = figure.subplots()
    ax.imshow(sheet, cmap="magma", norm=LogNorm(FAINTEST, 1), interpolation="nearest")
    ax.set_xticks(np.arange(H) * (n + 2) + n / 2, [*map(str, range(H))], fontsize=6)
    ax.set_yticks(np.arange(L) * (n + 2) + n / 2, [*map(str, range(L))], fontsize=6)
    ax.set(xlabel="head", ylabel="layer")
    ax.set_facecolor("0.6")  # the gaps
    ax.spines[:].set_visible(False)
    figure.savefig(path, dpi=80)
