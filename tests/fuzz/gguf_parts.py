"""GGUF files of a small Llama in parts, and their writer: our own, because a good one does not lie."""

import struct
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np

from tests.sinks.checkpoints import LLAMA, D, F, H, K, byte_level_metadata, tensors
from tests.sinks.test_tokenizer import sentencepiece_metadata

U8, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 5, 6, 7, 8, 9, 10
U32, F64 = 4, 12
CODES = {U8: "B", I32: "i", F32: "f", BOOL: "?", U64: "Q", U32: "I", F64: "d"}
Q = gguf.GGMLQuantizationType
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers.": "blk.",
}  # fmt: skip


@dataclass
class Item:
    """A tensor as the header will describe it; `offset` None: where it lies."""

    name: str
    shape: list[int]
    kind: int
    data: bytes
    offset: int | None = None


@dataclass
class File:
    """A GGUF file in parts. Values are (type, value); an array is (ARRAY, (type, values))."""

    keys: list[tuple[str, int, Any]]
    tensors: list[Item]
    align: int = 32
    counts: tuple[int, int] = (0, 0)  # added to what the header says
    version: int = 3
    tail: bytes = field(default=b"")

    def find(self, name: str) -> int:
        return [key for key, *_ in self.keys].index(name)

    def set(self, name: str, kind: int, value: Any) -> None:
        if name in [key for key, *_ in self.keys]:
            self.keys[self.find(name)] = (name, kind, value)
        else:
            self.keys.append((name, kind, value))

    def tensor(self, name: str) -> Item:
        return next(item for item in self.tensors if item.name == name)


def _string(text: str | bytes) -> bytes:
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _string(value)
    if isinstance(value, bytes):
        return value
    if kind == ARRAY:
        inner, values, *lie = value
        n = lie[0] if lie else len(values)
        return struct.pack("<IQ", inner, n) + b"".join(_value(inner, v) for v in values)
    return struct.pack(f"<{CODES[kind]}", value)


def header(file: File) -> bytes:
    """All before the data."""
    more_tensors, more_keys = file.counts
    out = [b"GGUF", struct.pack("<I", file.version)]
    out.append(struct.pack("<QQ", len(file.tensors) + more_tensors, len(file.keys) + more_keys))
    out += [_string(key) + struct.pack("<I", kind) + _value(kind, v) for key, kind, v in file.keys]
    at = 0
    for item in file.tensors:
        offset = at if item.offset is None else item.offset
        dims = [d % 2**64 for d in item.shape[::-1]]
        out.append(_string(item.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        out.append(struct.pack("<IQ", item.kind, offset % 2**64))
        at += -(-len(item.data) // file.align) * file.align
    return b"".join(out)


def write(file: File) -> bytes:
    out = bytearray(header(file))
    for item in file.tensors:
        out += bytes(-len(out) % file.align) + item.data
    return bytes(out + file.tail)


def _typed(value: Any) -> tuple[int, Any]:
    if isinstance(value, list):
        kind = STRING if isinstance(value[0], str) else I32 if isinstance(value[0], int) else F32
        return ARRAY, (kind, value)
    return (STRING if isinstance(value, str) else U32), value


def good(rng: np.random.Generator) -> File:
    """A file that loads: one of several kinds that exist."""
    pieces = rng.random() < 0.3
    words = sentencepiece_metadata() if pieces else byte_level_metadata()
    n = len(words["tokenizer.ggml.tokens"])
    keys: list[tuple[str, int, Any]] = [
        ("general.architecture", STRING, "llama"),
        ("llama.block_count", U32, 2),
        ("llama.context_length", U32, 64),
        ("llama.embedding_length", U32, D),
        ("llama.feed_forward_length", U32, F),
        ("llama.attention.head_count", U32, H),
        ("llama.attention.head_count_kv", U32, 2),
        ("llama.attention.layer_norm_rms_epsilon", F32, 1e-6),
        ("llama.rope.freq_base", F32, 500_000.0),
        ("llama.rope.dimension_count", U32, K),
        ("llama.vocab_size", U32, n),
        ("general.file_type", U32, 0),
        ("general.tags", ARRAY, (STRING, ["text", "fuzz"])),
    ]
    keys += [(key, *_typed(value)) for key, value in words.items()]
    items = []
    for name, values in tensors({**LLAMA, "vocab_size": n}).items():
        if name == "lm_head.weight" and rng.random() < 0.5:
            continue  # tied
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            values = np.resize(values, (n, D))
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        kind = Q(rng.choice([Q.F32, Q.F32, Q.F16, Q.BF16])) if values.ndim > 1 else Q.F32
        data = gguf.quants.quantize(values, kind).tobytes()
        items.append(Item(name, list(values.shape), int(kind), data))
    file = File(keys, items)
    if (
        rng.random() < 0.3
    ):  # Llama 3's table: one short wave, and one so long that it is slowed by all of the factor
        file.set("llama.rope.freq_base", F32, 1e9)
        items.append(Item("rope_freqs.weight", [K // 2], 0, np.array([1, 8], np.float32).tobytes()))
    return file


def nested(depth: int) -> bytes:
    """An array in an array, `depth` times."""
    return struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQi", I32, 1, 1)
