"""Llama-architecture GGUF files: metadata, and tensors under the names and in the order of Hugging Face's checkpoints.

The header is read here, a hundred times faster than by the gguf package, and every length in it is checked against the
file. The gguf package knows the block formats. Whatever is wrong with a file is one ValueError.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sinks.config import ModelConfig, RopeScaling
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


@dataclass(frozen=True)
class GGUF:
    """A file as it is: metadata by key, and tensors under llama.cpp's names, [out, in], float32 when read."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: str | Path) -> GGUF:
    """Opens a GGUF file (version 2 or 3); values are read when they are asked for.

    Raises ValueError where the file is no GGUF, is cut off, or has tensors in a format not among FORMATS.
    """
    path = Path(path)
    try:
        data = np.memmap(path, mode="r")
    except ValueError:  # numpy cannot map an empty file
        raise ValueError(f"{path} is empty") from None
    header = _Header(data, path)
    if bytes(data[:4]) != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it begins with {bytes(data[:4])!r}")
    version, n_tensors, n_keys = header.unpack("4xIQQ")
    if version not in (2, 3):
        raise ValueError(f"{path} is GGUF version {version}: 2 and 3 (little-endian) can be read")
    metadata = {}
    for _ in range(n_keys):
        key = header.string()
        metadata[key] = header.value(*header.unpack("I"))
    infos = []
    for _ in range(n_tensors):
        name, (rank,) = header.string(), header.unpack("I")
        infos.append((name, header.unpack(f"{rank}Q")[::-1], *header.unpack("IQ")))
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        raise ValueError(f"{path} has general.alignment={align!r}: it is damaged")
    start = -(-header.at // align) * align
    tensors, problems = {}, []
    for name, shape, kind, offset in infos:
        try:
            tensors[name] = _tensor(data, shape, kind, start + offset)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError(f"{path} cannot be used\n  " + "\n  ".join(problems))
    return GGUF(metadata, tensors)


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

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, n = self.unpack("IQ")
            if code := _SCALARS.get(kind):
                return list(struct.unpack(f"<{n}{code}", self.take(n * struct.calcsize(code))))
            return [self.value(kind) for _ in range(n)]
        if not (code := _SCALARS.get(kind)):
            raise ValueError(f"{self.path} has a value of unknown type {kind}: it is damaged")
        return self.unpack(code)[0]


def _tensor(data: np.ndarray, shape: tuple[int, ...], kind: int, start: int) -> Tensor:
    try:
        quant = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise ValueError(f"unknown format {kind}") from None
    if quant.name not in FORMATS:
        raise ValueError(f"format {quant.name} cannot be read, {', '.join(FORMATS)} can")
    block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
    if shape[-1] % block:
        raise ValueError(
            f"{quant.name} needs rows of a multiple of {block} values, not {shape[-1]}"
        )
    row_bytes = shape[-1] // block * block_bytes
    stop = start + row_bytes * int(np.prod(shape[:-1], dtype=np.int64))
    if stop > len(data):
        raise ValueError(
            f"its values end at byte {stop}, the file at {len(data)}: it is cut off, fetch it again"
        )
    rows = data[start:stop].reshape(*shape[:-1], row_bytes)
    return Tensor(shape, lambda: _dequantize(rows, quant))


def _dequantize(rows: np.ndarray, quant: gguf.GGMLQuantizationType) -> np.ndarray:
    if quant.name == "F32":
        return rows.view(np.float32)
    if quant.name == "F16":
        return rows.view(np.float16).astype(np.float32)
    return gguf.quants.dequantize(rows, quant)


def llama_config(file: GGUF, path: str | Path) -> ModelConfig:
    """The sizes of a Llama-architecture file. Raises ValueError for other architectures and for missing keys."""
    metadata = file.metadata
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise ValueError(
            f"{path} holds the architecture {architecture!r}: of GGUF files, 'llama' can be loaded. Other models "
            "load from the safetensors folder that they were converted from"
        )
    if metadata.get("llama.expert_count"):
        raise ValueError(f"{path} is a mixture of experts, which sinks/models/llama.py is not")
    needed = ("block_count", "context_length", "embedding_length", "feed_forward_length")
    needed = (*needed, "attention.head_count", "attention.layer_norm_rms_epsilon")
    if missing := [key for key in needed if f"llama.{key}" not in metadata]:
        raise ValueError(f"{path} lacks the keys {', '.join(f'llama.{key}' for key in missing)}")
    if missing := {"token_embd.weight", "blk.0.ffn_up.weight"} - file.tensors.keys():
        raise ValueError(f"{path} holds no {' and no '.join(sorted(missing))}")
    depth, positions, width, hidden, heads, eps = (metadata[f"llama.{key}"] for key in needed)

    def get(key: str, default: Any) -> Any:
        return metadata.get(f"llama.{key}", default)

    head_dim = get("attention.key_length", width // heads)
    bos, eos = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos"))
    return ModelConfig(
        family="llama",
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_dim=hidden,
        max_positions=positions,
        norm_eps=eps,
        rope_theta=get("rope.freq_base", 10_000.0),
        rope_fraction=get("rope.dimension_count", head_dim) / head_dim,
        rope_scaling=_rope_scaling(file, path, head_dim),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        tie_embeddings="output.weight" not in file.tensors,
        bos_id=-1 if bos is None else bos,
        eos_ids=() if eos is None else (eos,),
    )


def _rope_scaling(file: GGUF, path: str | Path, head_dim: int) -> RopeScaling | None:
    """RoPE's scaling: of Llama 3 the file holds the table it makes, one divisor for each frequency."""
    kind = file.metadata.get("llama.rope.scaling.type", "none")
    if kind != "none":
        return RopeScaling(kind, file.metadata.get("llama.rope.scaling.factor", 1.0))
    if "rope_freqs.weight" not in file.tensors:
        return None
    divisors = file.tensors["rope_freqs.weight"].read()
    scaling = RopeScaling("llama3", factor=float(divisors.max()))
    theta = file.metadata.get("llama.rope.freq_base", 10_000.0)
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((scaling.original_positions / waves - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / scaling.factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(
            f"{path} scales RoPE's frequencies by a table that is not Llama 3's with factor {scaling.factor:g}"
        )
    return scaling


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

    return Tensor(tensor.shape, read)
