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
from sinks.fields import shown
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
    """The queries that share a key head, its key and its value, for each key head."""
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
FLOATS = ("F64", "F32", "F16", "BF16")  # what weights may be stored as
# Tables that old checkpoints carry along: causal masks and RoPE's frequencies.
_IGNORED = re.compile(r"(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


def model_params(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    dtype: Any = np.float32,
    where: str = "this checkpoint",
    own_name: Callable[[str], str] = str,
) -> layouts.Params:
    """NumPy parameters of the model, blocks stacked, from tensors under Hugging Face's names.

    Args:
      where: the folder or file, for messages.
      own_name: what the file calls the tensor that Hugging Face calls so.

    Raises ValueError listing everything that is missing, unexpected, misshapen or no float, before anything is read or
    memory is asked for; and naming the first tensor with a value that is not finite.
    """
    if config.depth > len(tensors):
        raise ValueError(
            f"{where}: its config describes {config.depth} blocks, and there are {len(tensors)} tensors in all"
        )
    tree = layouts.abstract(config, dtype)
    plan, problems = _match(tensors, config, tree, own_name)
    if problems:
        more = [f"... and {len(problems) - 40} more"] if len(problems) > 40 else []
        lines = ["", *problems[:40], *more] if len(problems) > 1 else [f" {problems[0]}"]
        raise ValueError(
            f"{where}: its weights do not fit the {config.family} model that its config describes:"
            + "\n  ".join(lines)
        )
    try:
        params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), tree)
    except MemoryError:
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 1e9
        raise ValueError(
            f"{where}: its parameters take {size:.1f} GB as {np.dtype(dtype).name}, more than this machine gives: "
            "try dtype='bfloat16', or a smaller model"
        ) from None
    split = NAMES[config.family].split
    for tensor, slots in track(plan, "reading weights"):
        value = tensor.read()
        parts = split(value, config) if split and len(slots) > 1 else [value]
        for slot, part in zip(slots, parts, strict=True):
            view = _view(params, slot)
            with np.errstate(over="ignore"):  # is looked for below
                view[...] = part if slot == "embed" else part.T
            if not _finite(view):
                raise ValueError(
                    f"{tensor.file}: {shown(tensor.name)} holds values that are NaN, infinite or too large for "
                    f"{np.dtype(dtype).name}: the file is damaged, fetch it again"
                )
    return params


def _match(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    tree: layouts.Params,
    own_name: Callable[[str], str],
) -> tuple[list[tuple[Tensor, list[str]]], list[str]]:
    """Which tensor fills which slots of the model, and what is wrong with that."""
    shapes = {name: leaf.shape for name, leaf in tree.items() if name != "blocks"}
    for i in range(config.depth):
        blocks = tree["blocks"].items()
        shapes |= {f"blocks.{i}.{name}": leaf.shape[1:] for name, leaf in blocks}
    names, problems, plan = NAMES[config.family], [], []
    for name, tensor in tensors.items():
        if not (slots := _slots(name, names, config)):
            continue
        found = [shapes.pop(slot) for slot in slots if slot in shapes]
        there = shown(tensor.name or name)
        if len(found) < len(slots):
            problems.append(f"unexpected: {there}")
            continue
        shape = found[0] if slots == ["embed"] else _shape_in_file(found)
        if shape != tuple(tensor.shape):
            problems.append(f"misshapen: {there} is {tuple(tensor.shape)}, the model needs {shape}")
        if tensor.dtype not in FLOATS:
            problems.append(
                f"of another kind: {there} holds {tensor.dtype}, a weight is {', '.join(FLOATS)}"
            )
        plan.append((tensor, slots))
    missing = dict.fromkeys(_names_of(slot, names, own_name) for slot in shapes)
    return plan, problems + [f"missing: {name}" for name in missing]


def _view(params: layouts.Params, slot: str) -> np.ndarray:
    if not slot.startswith("blocks."):
        return params[slot]
    _, i, name = slot.split(".")
    return params["blocks"][name][int(i)]


def _finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite: the extremes tell, several times faster than asking each."""
    if values.dtype == np.float32:
        return bool(np.isfinite(values.min()) and np.isfinite(values.max()))
    return bool(np.isfinite(values).all())


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


def _names_of(slot: str, names: Names, own_name: Callable[[str], str]) -> str:
    """What the file may call what fills a slot: `_slots` the other way round."""
    block, _, ours = slot.rpartition(".")
    kind = ".bias" if ours.endswith("_bias") else ".weight"
    ours = ours.removesuffix("_bias")
    table, prefix = names.top, "" if ours == "unembed" else names.base
    if block:
        table, prefix = names.block, f"{names.base}{names.blocks}{block.removeprefix('blocks.')}."
    if names.split and ours in ("q", "k", "v"):
        ours = "qkv"
    theirs = [own_name(f"{prefix}{there}{kind}") for there, here in table.items() if here == ours]
    return " or ".join(theirs) or slot


def _shape_in_file(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """[out] or [out, in]; of a joint projection, row under row."""
    return (sum(shape[-1] for shape in shapes), *shapes[0][:-1])
