"""From a name or a path to a model that can be run: config, parameters and tokenizer.

    config, params, tokenizer = sinks.load("smollm2-135m")      # fetched once, then offline
    config, params, tokenizer = sinks.load("model.gguf")        # Llama architecture
    config, params, tokenizer = sinks.load("folder/")           # safetensors: Llama, Mistral, Pythia, MPT, Falcon
    config, params, tokenizer = sinks.load("EleutherAI/pythia-160m")

Before anything is returned, the model reads a paragraph of English: weights whose features are in the wrong order answer
fluently enough to be mistaken for good ones, and this tells them apart.
"""

import difflib
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sinks import convert, gguf_file, hf_config, hub, stream, tokenizer_files, weights
from sinks import params as layouts
from sinks.cache import CacheSpec
from sinks.config import ModelConfig
from sinks.params import Params
from sinks.tokenizer import Tokenizer

PARAGRAPH = (  # the Declaration of Independence: whoever has read English text has read it
    "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their Creator with "
    "certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness. That to secure these "
    "rights, Governments are instituted among Men, deriving their just powers from the consent of the governed, That "
    "whenever any Form of Government becomes destructive of these ends, it is the Right of the People to alter or to "
    "abolish it, and to institute new Government, laying its foundation on such principles and organizing its powers in "
    "such form, as to them shall seem most likely to effect their Safety and Happiness."
)
SUSPICIOUS = 20.0  # perplexity of PARAGRAPH: SmolLM2-135M's is 4.7, and over 70 with RoPE's features in a wrong order
DTYPES = ("float32", "bfloat16")  # of parameters
UNFORESEEN = "cannot be loaded: it is damaged, or has what this reader does not know"


class Model(NamedTuple):
    """What `load` returns; `sinks.models.family(config)` computes it, `sinks.stream` runs it."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer


def load(
    name_or_path: str | Path,
    *,
    dtype: Any = "float32",
    check: bool = True,
    mesh: Mesh | None = None,
) -> Model:
    """Loads a model with its tokenizer.

    Args:
      name_or_path: a name of `hub.FILES`; a .gguf file; a folder with config.json, tokenizer.json and safetensors; or a
        model on the Hugging Face hub, "owner/name" or "owner/name@revision".
      dtype: of the parameters: "float32", or "bfloat16" for half the memory.
      check: whether the model reads a paragraph first (see `check_reading`).
      mesh: spreads the parameters over these devices (`params.RULES`), one array after the other.

    Raises:
      ValueError: the path holds no model that can be loaded, its weights are not what their config says, or the mesh
        does not divide them.
      OSError: what must be downloaded cannot be.
    """
    dtype = _check_dtype(dtype)
    path = _locate(name_or_path)
    with _named(path):
        opened = _open(path)
        text = _tokenizer(path, opened)
    if text.vocab_size > opened.config.vocab_size:
        raise ValueError(
            f"{path}: its tokenizer knows {text.vocab_size} tokens, its weights {opened.config.vocab_size}: they do "
            "not belong together"
        )
    params = _params(opened, dtype, mesh)
    if check:
        check_reading(opened.config, params, text, str(path))
    return Model(opened.config, params, text)


def load_weights(
    path: str | Path, *, dtype: Any = "float32", mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Config and parameters of a .gguf file or a safetensors folder, which needs no tokenizer."""
    dtype, path = _check_dtype(dtype), Path(path)
    with _named(path):
        opened = _open(path)
    return opened.config, _params(opened, dtype, mesh)


def _check_dtype(dtype: Any) -> str:
    """The name of a type that parameters can be loaded in."""
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        hint = ""
        if name == "int8":
            hint = (
                ". For weights in 8 bits, load them as float32 and call sinks.stream.prepare(params, int8=True); in "
                "the chat that is --weights=int8"
            )
        raise ValueError(f"dtype={name!r}: parameters load as {' or '.join(DTYPES)}{hint}")
    return name


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The last resort: an error that no check foresaw is about this path, and one line, as those that the checks raise."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        folder = path if path.is_dir() else path.parent  # of a tokenizer next to a GGUF file
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        raise ValueError(f"{path} {UNFORESEEN} ({type(error).__name__}: {error})") from error


def _locate(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    if name in hub.FILES:
        return hub.fetch(name)
    if (path := Path(name).expanduser()).exists():
        return path
    if isinstance(name_or_path, str) and weights.is_hub_id(name):
        return weights.fetch_from_hub(name)
    close = difflib.get_close_matches(name, hub.FILES, n=1, cutoff=0.5)
    raise ValueError(
        f"{name!r} is no file, no folder, no model on the hub (owner/name), and not one of {', '.join(hub.FILES)}"
        + (f": did you mean {close[0]!r}?" if close else "")
    )


class _Opened(NamedTuple):
    """A checkpoint whose config is known and whose tensors wait; `own_name` is of `convert.model_params`."""

    path: Path
    config: ModelConfig
    tensors: dict[str, weights.Tensor]
    own_name: Callable[[str], str] = str
    file: gguf_file.GGUF | None = None


def _open(path: Path) -> _Opened:
    if path.is_dir() and not (path / "config.json").exists():
        inside = sorted(path.glob("*.gguf"))
        if len(inside) > 1:
            found = ", ".join(file.name for file in inside)
            raise ValueError(f"{path} holds several GGUF files, name one of them: {found}")
        path = inside[0] if inside else path
    if path.is_dir():
        settings, tensors = weights.read_folder(path)
        return _Opened(path, hf_config.model_config(settings, str(path / "config.json")), tensors)
    file = gguf_file.read(path)
    config = gguf_file.llama_config(file, path)
    tensors = gguf_file.llama_tensors(file, config)
    return _Opened(path, config, tensors, gguf_file.own_name, file)


def _params(opened: _Opened, dtype: str, mesh: Mesh | None) -> Params:
    config = opened.config
    where = layouts.param_shardings(config, mesh) if mesh is not None else None
    with _named(opened.path):
        params = convert.model_params(
            opened.tensors, config, jnp.dtype(dtype), str(opened.path), opened.own_name
        )
    leaves, treedef = jax.tree.flatten(params)
    places = jax.tree.leaves(where) if where is not None else [None] * len(leaves)
    del params
    for i, place in enumerate(places):  # one at a time: two copies of the whole may not fit
        leaves[i] = jax.device_put(jnp.asarray(leaves[i]) if place is None else leaves[i], place)
    return jax.tree.unflatten(treedef, leaves)


def _tokenizer(path: Path, opened: _Opened) -> Tokenizer:
    folder = path if path.is_dir() else path.parent
    if opened.file is None or (folder / "tokenizer.json").is_file():
        return tokenizer_files.from_folder(folder)
    return tokenizer_files.from_gguf(opened.file.metadata, str(opened.path))


def check_reading(config: ModelConfig, params: Params, text: Tokenizer, where: str = "") -> float:
    """The model's perplexity on PARAGRAPH, which is low if the weights are where they belong.

    Where it is not, the other orders of RoPE's features are tried, which converters confuse. Raises ValueError if one of
    them reads clearly better, or if the weights make no number at all; warns otherwise (another language, or damaged
    weights).
    """
    ids = text.encode(PARAGRAPH)
    if len(ids) < 2:
        raise ValueError(
            f"{where}: its tokenizer makes {len(ids)} tokens of a paragraph of English"
        )
    ids = jnp.asarray([[text.bos_id, *ids] if text.bos_id is not None else ids])
    loaded = float(_perplexity(config, params, ids))
    if math.isnan(loaded):
        raise ValueError(
            f"{where}: the model's answer to a paragraph of English is NaN: its weights are damaged, or too large for "
            "their type. Fetch it again"
        )
    if loaded < SUSPICIOUS:
        return loaded
    if config.rotary_dim:
        for order in (_pairs_to_halves, _halves_to_pairs):
            other = float(_perplexity(config, _reorder(config, params, order), ids))
            # An untrained model's two perplexities differ by chance, and are no better than a guess's.
            if other < min(loaded / 1.2, config.vocab_size / 2):
                raise ValueError(
                    f"{where}: the features that RoPE rotates are in the wrong order: perplexity {loaded:.0f} on plain "
                    f"English, and {other:.0f} after {order.__name__.strip('_').replace('_', ' ')}. The program that "
                    "converted these weights put them so; convert them again, or load them with check=False"
                )
    warnings.warn(
        f"{where}: this model reads English badly. Its perplexity on a well-known paragraph is {loaded:.0f}: a model "
        f"trained on English has less than {SUSPICIOUS:.0f}, and guessing each token by lot "
        f"has {config.vocab_size}. That is right for an untrained model or one of another language; any other is damaged",
        stacklevel=3,
    )
    return loaded


@partial(jax.jit, static_argnums=0)
def _perplexity(config: ModelConfig, params: Params, ids_BT: jax.Array) -> jax.Array:
    spec = CacheSpec(sinks=0, recent=ids_BT.shape[1])
    x_BTD = stream.hidden_from_start(config, params, spec, ids_BT[:, :-1])
    logprob_BTV = jax.nn.log_softmax(stream.unembed(config, params, x_BTD))
    return jnp.exp(-jnp.take_along_axis(logprob_BTV, ids_BT[:, 1:, None], -1).mean())


def _pairs_to_halves(n: int) -> np.ndarray:
    """The order that puts rotated pairs, stored side by side, half a head apart."""
    return np.arange(n).reshape(-1, 2).T.reshape(-1)


def _halves_to_pairs(n: int) -> np.ndarray:
    return np.arange(n).reshape(2, -1).T.reshape(-1)


def _reorder(config: ModelConfig, params: Params, order) -> Params:
    index = np.concatenate(
        [order(config.rotary_dim), np.arange(config.rotary_dim, config.head_dim)]
    )

    def features(leaf: jax.Array) -> jax.Array:
        heads = leaf.reshape(*leaf.shape[:-1], -1, config.head_dim)
        return heads[..., index].reshape(leaf.shape)

    moved = ("q", "k", "q_bias", "k_bias")
    blocks = {k: features(v) if k in moved else v for k, v in params["blocks"].items()}
    return {**params, "blocks": blocks}
