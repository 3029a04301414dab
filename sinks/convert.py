"""Hugging Face's tensor names into our parameter trees: one table of names for each family.

Kernels are transposed to [in, out], and joint projections of query, key and value are cut apart. RoPE's features need no
change (those of GGUF files do, see sinks/gguf_file.py).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sinks import params as layouts
from sinks.config import ModelConfig
from sinks.progress import track
from sinks.weights import Tensor


@dataclass(frozen=True)
class Names:
    """Hugging Face's names of a family's layers, without ".weight" and ".bias", and ours.

    Attributes:
      base: the prefix of all but the head; a file saved without its head lacks it.
      blocks: what comes before a block's number.
      split: cuts the rows of a joint projection, ours is called "qkv", into query, key and value.
    """

    base: str
    top: dict[str, str]
    blocks: str
    block: dict[str, str]
    split: Callable[[np.ndarray, ModelConfig], list[np.ndarray]] | None = None


def _by_group(rows: np.ndarray, c: ModelConfig) -> list[np.ndarray]:
    """For each key head: the queries that share it, the key, the value."""
    groups = rows.reshape(c.kv_heads, c.groups + 2, c.head_dim, *rows.shape[1:])
    parts = groups[:, :-2], groups[:, -2], groups[:, -1]
    return [part.reshape(-1, *rows.shape[1:]) for part in parts]


def _one_after_another(rows: np.ndarray, c: ModelConfig) -> list[np.ndarray]:
    """All queries, all keys, all values."""
    query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return np.split(rows, [query, query + key])


_NEOX_MLP = {"mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down"}
NAMES = {
    "llama": Names(
        base="model.",
        top={"embed_tokens": "embed", "norm": "norm", "lm_head": "unembed"},
        blocks="layers.",
        block={
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "q",
            "self_attn.k_proj": "k",
            "self_attn.v_proj": "v",
            "self_attn.o_proj": "o",
            "post_attention_layernorm": "mlp_norm",
            "mlp.gate_proj": "gate",
            "mlp.up_proj": "up",
            "mlp.down_proj": "down",
        },
    ),
    "neox": Names(
        base="gpt_neox.",
        top={
            "embed_in": "embed",
            "final_layer_norm": "norm",
            "embed_out": "unembed",  # on the hub
            "lm_head": "unembed",  # since transformers 5
        },
        blocks="layers.",
        block={
            "input_layernorm": "attn_norm",
            "attention.query_key_value": "qkv",
            "attention.dense": "o",
            "post_attention_layernorm": "mlp_norm",
            **_NEOX_MLP,
        },
        split=_by_group,
    ),
    "mpt": Names(
        base="transformer.",
        top={"wte": "embed", "norm_f": "norm", "lm_head": "unembed"},
        blocks="blocks.",
        block={
            "norm_1": "attn_norm",
            "attn.Wqkv": "qkv",
            "attn.out_proj": "o",
            "norm_2": "mlp_norm",
            "ffn.up_proj": "up",
            "ffn.down_proj": "down",
        },
        split=_one_after_another,
    ),
    "falcon": Names(
        base="transformer.",
        top={"word_embeddings": "embed", "ln_f": "norm", "lm_head": "unembed"},
        blocks="h.",
        block={
            "input_layernorm": "attn_norm",
            "ln_attn": "attn_norm",
            "ln_mlp": "mlp_norm",
            "post_attention_layernorm": "mlp_norm",
            "self_attention.query_key_value": "qkv",
            "self_attention.dense": "o",
            **_NEOX_MLP,
        },
        split=_by_group,
    ),
}
# Tables that old checkpoints carry along: causal masks and RoPE's frequencies.
_IGNORED = re.compile(r"(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


def model_params(
    tensors: Mapping[str, Tensor], config: ModelConfig, dtype: Any = np.float32
) -> layouts.Params:
    """NumPy parameters of the model, blocks stacked, from tensors under Hugging Face's names.

    Raises ValueError listing everything that is missing, unexpected or misshapen, before anything is read.
    """
    params = jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype), layouts.abstract(config, dtype)
    )
    empty = dict(params)
    for i in range(config.depth):
        empty |= {f"blocks.{i}.{name}": stack[i] for name, stack in empty["blocks"].items()}
    del empty["blocks"]
    names, problems, plan = NAMES[config.family], [], []
    for name, tensor in tensors.items():
        if not (slots := _slots(name, names, config)):
            continue
        views = [empty.pop(slot) for slot in slots if slot in empty]
        if len(views) < len(slots):
            problems.append(f"unexpected: {name}")
            continue
        kernel = slots != ["embed"]
        shape = _shape_in_file(views) if kernel else views[0].shape
        if shape != tuple(tensor.shape):
            problems.append(f"misshapen: {name} is {tuple(tensor.shape)}, the model needs {shape}")
        plan.append((tensor, views, kernel))
    problems += [f"missing: {slot}" for slot in empty]
    if problems:
        more = [f"... and {len(problems) - 40} more"] if len(problems) > 40 else []
        raise ValueError(
            f"these weights do not fit the {config.family} model that their config describes\n  "
            + "\n  ".join(problems[:40] + more)
        )
    for tensor, views, kernel in track(plan, "reading weights"):
        value = tensor.read()
        parts = names.split(value, config) if names.split and len(views) > 1 else [value]
        for view, part in zip(views, parts, strict=True):
            view[...] = part.T if kernel else part
    return params


def _slots(name: str, names: Names, config: ModelConfig) -> list[str]:
    """Where a tensor goes: three places for a joint projection, none if it is not needed, its own name if unknown."""
    stem, _, kind = name.removeprefix(names.base).rpartition(".")
    block = ""
    table = names.top
    if stem.startswith(names.blocks):
        number, _, stem = stem.removeprefix(names.blocks).partition(".")
        block, table = f"blocks.{number}.", names.block
    ours, suffix = table.get(stem), {"weight": "", "bias": "_bias"}.get(kind)
    if _IGNORED.search(name) or (ours == "unembed" and config.tie_embeddings):
        return []
    if ours is None or suffix is None:
        return [name]
    return [f"{block}{part}{suffix}" for part in (ours if ours == "qkv" else [ours])]


def _shape_in_file(views: list[np.ndarray]) -> tuple[int, ...]:
    """[out] or [out, in]; of a joint projection, row under row."""
    return (sum(view.shape[-1] for view in views), *views[0].shape[:-1])
