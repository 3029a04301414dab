"""Llama-architecture GGUF files: metadata, and tensors under the names and in the order of Hugging Face's checkpoints.

The header is read here, a hundred times faster than by the gguf package, and every length in it is checked against the
file. The gguf package knows the block formats. Whatever is wrong with a file is one ValueError.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from sinks import fields
from sinks.config import ModelConfig, RopeScaling
from sinks.fields import TEXT, Field, Kind, count, number
from sinks.weights import Tensor

FORMATS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_SCALARS = dict(zip(range(13), ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")))
_STRING, _ARRAY = 8, 9

# llama.cpp's names of what Hugging Face calls (top level | in block N)
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_THERE, _BLOCK_THERE = ({there: here for here, there in t.items()} for t in (_TOP, _BLOCK))


# What the metadata may say. Most sizes may also be a list with a value for each block, which our models are not.
_SIZE = Field(count())
_POWER = Kind(
    "a power of two from 8 to 65536", lambda v: count(8, 65536).holds(v) and not v & (v - 1)
)
_ALIGN = {"general.alignment": Field(_POWER, default=32)}
_GENERAL = {
    "general.architecture": Field(TEXT),
    "split.count": Field(count(0), default=0),
    "tokenizer.ggml.bos_token_id": Field(count(0), default=None),
    "tokenizer.ggml.eos_token_id": Field(count(0), default=None),
}
_LLAMA = {
    "expert_count": Field(count(0), default=0),
    "block_count": _SIZE,
    "context_length": _SIZE,
    "embedding_length": _SIZE,
    "feed_forward_length": _SIZE,
    "attention.head_count": _SIZE,
    "attention.head_count_kv": Field(count(), default=None),
    "attention.key_length": Field(count(), default=None),
    "attention.value_length": Field(count(), default=None),
    "attention.layer_norm_rms_epsilon": Field(number(0, 1)),
    "attention.sliding_window": Field(count(0), default=0),
    "rope.dimension_count": Field(count(2), default=None),
    "rope.freq_base": Field(number(1, 1e15), default=10_000.0),
    "rope.scaling.type": Field(TEXT, default=None),
    "rope.scaling.factor": Field(number(0, 1e6, or_equal=True), default=None),
    "rope.scale_linear": Field(number(0, 1e6, or_equal=True), default=None),
}
_DEEPEST = 4  # arrays within arrays; none are in use
_LONGEST_NAME = 256  # characters; llama.cpp allows 64 for a tensor
_LONGEST = 1 << 24  # values of an array: several times any vocabulary


@dataclass(frozen=True)
class GGUF:
    """A file as it is: metadata by key, and tensors under llama.cpp's names, [out, in], float32 when read."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


class _Info(NamedTuple):
    """What the header says of a tensor; `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def read(path: str | Path) -> GGUF:
    """Opens a GGUF file (version 2 or 3); values are read when they are asked for.

    Raises ValueError where the file is no GGUF, is cut off, has tensors in a format not among FORMATS, or says of its
    tensors what cannot be: they lie one after another and fill the file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device, a pipe
        raise ValueError(f"{path} is no regular file")
    try:
        data = np.memmap(path, mode="r").view(np.ndarray)  # slices of a memmap are slow
    except ValueError:  # numpy cannot map an empty file
        raise ValueError(f"{path} is empty") from None
    header = _Header(data, path)
    if bytes(data[:4]) != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it begins with {bytes(data[:4])!r}")
    version, n_tensors, n_keys = header.unpack("4xIQQ")
    if version not in (2, 3):
        raise ValueError(f"{path} is GGUF version {version}: 2 and 3 (little-endian) can be read")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = header.name()
        if key in metadata:
            raise ValueError(f"{path} has {key} twice: it is damaged")
        metadata[key] = header.value(key, *header.unpack("I"))
    infos = [_info(header) for _ in range(n_tensors)]
    align = fields.read(metadata, _ALIGN, str(path))["general.alignment"]
    return GGUF(metadata, _tensors(data, infos, header.at, align, path))


class _Header:
    """A cursor over the header, which cannot run past the file's end."""

    def __init__(self, data: np.ndarray, path: Path):
        self.data, self.path, self.at = data.data, path, 0

    def take(self, size: int) -> memoryview:
        if self.at + size > len(self.data):
            raise ValueError(
                f"{self.path} ends inside its header ({len(self.data)} bytes): it is cut off or damaged, fetch it again"
            )
        piece = self.data[self.at : self.at + size]
        self.at += size
        return piece

    def unpack(self, layout: str) -> tuple:
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))

    def string(self) -> str:
        return str(self.take(*self.unpack("Q")), "utf-8", "replace")

    def name(self) -> str:
        """The name of a key or a tensor: short, in printable ASCII characters."""
        name = self.string()
        if not (0 < len(name) <= _LONGEST_NAME and name.isascii() and name.isprintable()):
            raise ValueError(
                f"{self.path} has a name of {len(name)} characters, {name[:40]!r}: it is damaged"
            )
        return name

    def value(self, key: str, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, n = self.unpack("IQ")
            if n > _LONGEST or depth == _DEEPEST:
                says = f"{n} values" if n > _LONGEST else "arrays in arrays in arrays"
                raise ValueError(f"{self.path} has {key} with {says}: it is damaged")
            if code := _SCALARS.get(kind):
                return list(struct.unpack(f"<{n}{code}", self.take(n * struct.calcsize(code))))
            return [self.value(key, kind, depth + 1) for _ in range(n)]
        if not (code := _SCALARS.get(kind)):
            raise ValueError(f"{self.path} has {key} of unknown type {kind}: it is damaged")
        return self.unpack(code)[0]


def _info(header: _Header) -> _Info:
    name, (rank,) = header.name(), header.unpack("I")
    if not 1 <= rank <= 4:
        raise ValueError(f"{header.path}: {name} has {rank} axes, a tensor has 1 to 4")
    shape = header.unpack(f"{rank}Q")[::-1]
    if min(shape) < 1:
        raise ValueError(f"{header.path}: {name} has the shape {shape}")
    return _Info(name, shape, *header.unpack("IQ"))


def _tensors(
    data: np.ndarray, infos: list[_Info], end: int, align: int, path: Path
) -> dict[str, Tensor]:
    """The tensors by name. The header ends at byte `end`; each of them begins at a multiple of `align` after it, the next
    one after the other, and nothing else is in the file."""

    def aligned(n: int) -> int:
        return -(-n // align) * align

    start, tensors, problems, expected, last = aligned(end), {}, [], 0, ""
    for info in sorted(infos, key=lambda info: info.offset):
        try:
            quant, row_bytes = _format(info)
            begin, size = start + info.offset, row_bytes * math.prod(info.shape[:-1])
            if begin + size > len(data):
                raise ValueError(
                    f"its values end at byte {begin + size}, the file at {len(data)}: it is cut off, fetch it again"
                )
            if info.offset != expected:
                after = f"{last} ends" if last else "the data begin"
                raise ValueError(
                    f"its values begin at byte {begin}, and not at {start + expected} where {after}: the header is damaged"
                )
            if info.name in tensors:
                raise ValueError("there are two of this name")
        except ValueError as error:
            problems.append(f"{info.name}: {error}")
            break  # what follows lies elsewhere because of it
        expected, last = aligned(info.offset + size), info.name
        tensors[info.name] = _tensor(data[begin : begin + size], info, quant, row_bytes, path)
    if not problems and len(data) > start + expected:
        problems.append(
            f"{len(data) - start - expected} bytes after its last tensor belong to none"
        )
    if problems:
        raise ValueError(f"{path} cannot be used: {'; '.join(problems)}")
    return tensors


def _format(info: _Info) -> tuple[gguf.GGMLQuantizationType, int]:
    """A tensor's format, and the bytes of one of its rows."""
    try:
        quant = gguf.GGMLQuantizationType(info.kind)
    except ValueError:
        raise ValueError(f"unknown format {info.kind}") from None
    if quant.name not in FORMATS:
        raise ValueError(f"format {quant.name} cannot be read, {', '.join(FORMATS)} can")
    block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
    if info.shape[-1] % block:
        raise ValueError(
            f"{quant.name} needs rows of a multiple of {block} values, not {info.shape[-1]}"
        )
    return quant, info.shape[-1] // block * block_bytes


def _tensor(
    data: np.ndarray, info: _Info, quant: gguf.GGMLQuantizationType, row_bytes: int, path: Path
) -> Tensor:
    rows = data.reshape(*info.shape[:-1], row_bytes)
    return Tensor(info.shape, lambda: _dequantize(rows, quant), "F32", info.name, path)


def _dequantize(rows: np.ndarray, quant: gguf.GGMLQuantizationType) -> np.ndarray:
    if quant.name == "F32":
        return rows.view(np.float32)
    if quant.name == "F16":
        return rows.view(np.float16).astype(np.float32)
    return gguf.quants.dequantize(rows, quant)


def llama_config(file: GGUF, path: str | Path) -> ModelConfig:
    """The sizes of a Llama-architecture file.

    Raises ValueError for other architectures, and for keys that are missing or not what they must be.
    """
    general = fields.read(file.metadata, _GENERAL, str(path))
    if (architecture := general["general.architecture"]) != "llama":
        raise ValueError(
            f"{path} holds the architecture {architecture!r}: of GGUF files, 'llama' can be loaded. Other models "
            "load from the safetensors folder that they were converted from"
        )
    if (parts := general["split.count"]) > 1:
        raise ValueError(
            f"{path} is one of {parts} parts of a model: join them with llama.cpp's `llama-gguf-split --merge`"
        )
    keys = fields.read(file.metadata, _LLAMA, str(path), "llama.")
    if keys["expert_count"]:
        raise ValueError(f"{path} is a mixture of experts, which sinks/models/llama.py is not")
    if missing := {"token_embd.weight", "blk.0.ffn_up.weight"} - file.tensors.keys():
        raise ValueError(f"{path} holds no {' and no '.join(sorted(missing))}")
    heads, width = keys["attention.head_count"], keys["embedding_length"]
    head_dim = keys["attention.key_length"] or width // heads
    vocab = file.tensors["token_embd.weight"].shape[0]
    bos, eos = (general[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos"))
    for kind, token in (("bos", bos), ("eos", eos)):
        if token is not None and token >= vocab:
            raise ValueError(
                f"{path}: tokenizer.ggml.{kind}_token_id={token}, token_embd.weight has {vocab} rows"
            )
    try:
        _check_heads(keys, head_dim)
        return ModelConfig(
            family="llama",
            vocab_size=vocab,
            width=width,
            depth=keys["block_count"],
            heads=heads,
            kv_heads=keys["attention.head_count_kv"] or heads,
            head_dim=head_dim,
            mlp_dim=keys["feed_forward_length"],
            max_positions=min(
                keys["context_length"], keys["attention.sliding_window"] or fields.LARGEST
            ),
            norm_eps=keys["attention.layer_norm_rms_epsilon"],
            rope_theta=keys["rope.freq_base"],
            rope_fraction=(keys["rope.dimension_count"] or head_dim) / head_dim,
            rope_scaling=_rope_scaling(file, keys, head_dim),
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            out_bias="blk.0.attn_output.bias" in file.tensors,
            mlp_bias="blk.0.ffn_up.bias" in file.tensors,
            tie_embeddings="output.weight" not in file.tensors,
            bos_id=-1 if bos is None else bos,
            eos_ids=() if eos is None else (eos,),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_heads(keys: Mapping[str, Any], head_dim: int) -> None:
    """What must hold between llama.attention.* and the others."""
    heads, width = keys["attention.head_count"], keys["embedding_length"]
    if keys["attention.key_length"] is None and width % heads:
        raise ValueError(
            f"llama.embedding_length={width} is no multiple of llama.attention.head_count={heads}"
        )
    if heads % (groups := keys["attention.head_count_kv"] or heads):
        raise ValueError(
            f"llama.attention.head_count={heads} is no multiple of llama.attention.head_count_kv={groups}"
        )
    if (value := keys["attention.value_length"] or head_dim) != head_dim:
        raise ValueError(
            f"llama.attention.value_length={value}: values must be as wide as keys, {head_dim}"
        )
    if (rotated := keys["rope.dimension_count"] or head_dim) > head_dim:
        raise ValueError(f"llama.rope.dimension_count={rotated}: a head has {head_dim} features")


def _rope_scaling(file: GGUF, keys: Mapping[str, Any], head_dim: int) -> RopeScaling | None:
    """RoPE's scaling: of Llama 3 the file holds the table it makes, one divisor for each frequency.

    As in llama.cpp, a factor without a type is of "linear" (older files call it rope.scale_linear), and 0 is none.
    """
    factor = keys["rope.scaling.factor"] or keys["rope.scale_linear"] or 1.0
    kind = keys["rope.scaling.type"] or ("none" if factor == 1 else "linear")
    if kind != "none" and (kind, factor) != ("linear", 1):
        if "rope_freqs.weight" in file.tensors:
            raise ValueError(f"rope_freqs.weight and the rope scaling {kind!r} exclude each other")
        return RopeScaling(kind, factor)
    if "rope_freqs.weight" not in file.tensors:
        return None
    divisors = file.tensors["rope_freqs.weight"].read()
    if not (np.isfinite(divisors).all() and divisors.min() >= 1):
        raise ValueError(
            "rope_freqs.weight divides RoPE's frequencies by less than 1: it is damaged"
        )
    scaling = RopeScaling("llama3", factor=float(divisors.max()))
    theta = keys["rope.freq_base"]
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((scaling.original_positions / waves - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / scaling.factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(
            f"rope_freqs.weight scales RoPE's frequencies by a table that is not Llama 3's with factor {scaling.factor:g}"
        )
    return scaling


def own_name(name: str) -> str:
    """What a GGUF file calls the tensor that Hugging Face calls `name`; `llama_tensors` the other way round."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        number, _, stem = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{_BLOCK_THERE.get(stem, stem)}.{kind}"
    return f"{_TOP_THERE.get(stem, stem)}.{kind}"


def llama_tensors(file: GGUF, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors under Hugging Face's names, with RoPE's features in its order. Unknown names stay as they are."""
    tensors = {}
    for name, tensor in file.tensors.items():
        if name == "rope_freqs.weight":
            continue
        stem, _, kind = name.rpartition(".")
        if stem in _TOP:
            name = f"{_TOP[stem]}.{kind}"
        elif stem.startswith("blk.") and (parts := stem.split(".", 2))[-1] in _BLOCK:
            name = f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{kind}"
            if parts[2] in ("attn_q", "attn_k"):
                heads = config.heads if parts[2] == "attn_q" else config.kv_heads
                tensor = _halves(tensor, heads)
        tensors[name] = tensor
    return tensors


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """Undoes the converter's reordering: it puts the two features that RoPE rotates together side by side, (d/2, 2),
    where Hugging Face and we have them half a head apart, (2, d/2)."""

    def read() -> np.ndarray:
        rows = tensor.read()
        pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    return replace(tensor, read=read)
