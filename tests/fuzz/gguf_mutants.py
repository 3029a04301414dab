"""Ways to damage a GGUF file."""

import struct
from dataclasses import replace
from typing import Any

import gguf
import numpy as np

from tests.fuzz.gguf_parts import (
    ARRAY,
    BOOL,
    CODES,
    F32,
    I32,
    STRING,
    U8,
    U32,
    U64,
    Q,
    good,
    header,
    nested,
    write,
)  # fmt: skip
from tests.fuzz.mutant import LOAD, MAY, REFUSE, Mutant, damaged_bytes
from tests.sinks.checkpoints import H, K

USED = {  # keys that decide what is computed, and a value of each that no model has
    "general.architecture": (STRING, "llame"),
    "llama.block_count": (U32, 0),
    "llama.context_length": (U32, 0),
    "llama.embedding_length": (U32, 0),
    "llama.feed_forward_length": (U64, 2**40),
    "llama.attention.head_count": (U32, 0),
    "llama.attention.head_count_kv": (U32, 3),
    "llama.attention.key_length": (U32, 0),
    "llama.attention.value_length": (U32, K + 1),
    "llama.attention.layer_norm_rms_epsilon": (F32, 0.0),
    "llama.rope.freq_base": (F32, 0.0),
    "llama.rope.dimension_count": (U32, 3),
    "llama.rope.scaling.factor": (F32, -1.0),
    "llama.rope.scaling.type": (STRING, "yarn"),
    "tokenizer.ggml.model": (STRING, "bert"),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, ["a", "b"])),
    "tokenizer.ggml.token_type": (ARRAY, (I32, [1])),
    "tokenizer.ggml.bos_token_id": (U32, 10**9),
    "tokenizer.ggml.eos_token_id": (U32, 2**32 - 1),
    "tokenizer.ggml.eot_token_id": (U32, 264 + 300),
    "general.alignment": (U32, 0),
    "split.count": (U32, 2),
}
HUGE = ("llama.block_count", "llama.feed_forward_length", "llama.embedding_length")
NUMBERS = [0, 1, 2, 3, 7, 255, 10**6, 2**31 - 1, 2**31, 2**32 - 1]
FLOATS = [0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-30, 1e30, 1.0, 3e38]


def _other(rng: np.random.Generator, kind: int) -> tuple[int, Any]:
    """A value of another type."""
    values = [
        (STRING, "x"), (STRING, ""), (F32, float("nan")), (BOOL, True), (U8, 1), (U64, 2**63),
        (ARRAY, (I32, [1, 2])), (ARRAY, (STRING, ["a"])), (ARRAY, (I32, [])), (ARRAY, nested(2)),
        (ARRAY, (F32, [float("nan")] * 3)),
    ]  # fmt: skip
    values = [v for v in values if v[0] != kind]
    return values[rng.integers(len(values))]


# Each takes a random generator and a good file, changes it, and returns what must happen and a description.


def unchanged(rng, file):
    return LOAD, "unchanged"


def unknown_key(rng, file):
    file.keys.insert(rng.integers(len(file.keys) + 1), ("general.more", *_other(rng, -1)))
    return MAY if file.keys[-1][1] == ARRAY else LOAD, "a key that nobody knows"


def never_a_value(rng, file):
    key = rng.choice(list(USED))
    file.set(key, *USED[key])
    return REFUSE, f"{key}={USED[key]}"


def another_type(rng, file):
    key = rng.choice([key for key in USED if key in dict.fromkeys(k for k, *_ in file.keys)])
    kind = file.keys[file.find(key)][1]
    value = _other(rng, kind)
    file.set(key, *value)
    whole = kind in (U32, U8, U64, I32) and value[0] in (U8, U64)
    number = kind == F32 and value[0] in (U8, U64)
    return MAY if whole or number else REFUSE, f"{key} of another type: {value}"


def for_each_block(rng, file):
    key = rng.choice(["head_count", "head_count_kv"])
    file.set(f"llama.attention.{key}", ARRAY, (I32, [H, H]))
    return REFUSE, f"{key} for each block"


def another_number(rng, file):
    at = rng.choice([i for i, (_, kind, _) in enumerate(file.keys) if kind in CODES])
    key, kind, _ = file.keys[at]
    value = rng.choice(FLOATS) if kind == F32 else int(rng.choice(NUMBERS))
    file.keys[at] = (key, kind, value)
    return MAY, f"{key}={value}"


def far_too_large(rng, file):
    key, size = rng.choice(HUGE), int(rng.choice([10**5, 10**6, 2**31 - 1, 4 * 10**9]))
    file.set(key, U32, size)
    return REFUSE, f"{key}={size}"


def not_finite(rng, file):
    key = rng.choice(["llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"])
    value = rng.choice([float("nan"), float("inf"), -1.0, 0.0])
    file.set(key, F32, value)
    return REFUSE, f"{key}={value}"


def key_removed(rng, file):
    key, *_ = file.keys.pop(rng.integers(len(file.keys)))
    needed = key in USED or key in ("tokenizer.ggml.merges", "tokenizer.ggml.scores")
    spare = (
        "head_count_kv",
        "key_length",
        "freq_base",
        "dimension_count",
        "token_id",
        "token_type",
    )
    return REFUSE if needed and not key.endswith(spare) else MAY, f"without {key}"


def key_twice(rng, file):
    file.keys.append(file.keys[rng.integers(len(file.keys))])
    return REFUSE, f"{file.keys[-1][0]} twice"


def deep_arrays(rng, file):
    depth = int(rng.integers(10, 60_000))
    file.keys.append(("general.more", ARRAY, nested(depth)))
    return REFUSE, f"arrays {depth} deep"


def length_lie(rng, file):
    arrays = [i for i, (_, kind, _) in enumerate(file.keys) if kind == ARRAY]
    at = arrays[rng.integers(len(arrays))]
    key, kind, (inner, values) = file.keys[at]
    n = int(rng.choice([0, len(values) - 1, len(values) + 1, 2**24 + 1, 2**40, 2**63]))
    file.keys[at] = (key, kind, (inner, values, n))
    return REFUSE, f"{key} with {n} instead of {len(values)} values"


def counts_lie(rng, file):
    file.counts = [(1, 0), (-1, 0), (0, 1), (0, -1), (2**40, 0), (0, 2**60)][rng.integers(6)]
    return REFUSE, f"counts of tensors and keys off by {file.counts}"


def token_changed(rng, file):
    at = file.find("tokenizer.ggml.tokens")
    _, kind, (inner, values) = file.keys[at]
    values, i = list(values), int(rng.integers(len(values)))
    values[i] = str(rng.choice([values[i] + "x", "", values[(i + 1) % len(values)], "\x00", "é"]))
    file.keys[at] = ("tokenizer.ggml.tokens", kind, (inner, values))
    return MAY, f"token {i} is {values[i]!r}"


def merges_or_scores(rng, file):
    keys = ("tokenizer.ggml.merges", "tokenizer.ggml.scores")
    key = next(key for key, *_ in file.keys if key in keys)
    _, kind, (inner, values) = file.keys[file.find(key)]
    changed = [[], values[:-1], values[1:], values[::-1], [*values, values[0]]][rng.integers(5)]
    if key == keys[0] and rng.random() < 0.6:
        changed = [*values[1:], str(rng.choice(["h q", "he", " e", "h ", "zz yy"]))]
    file.set(key, kind, (inner, changed))
    return REFUSE if not changed else MAY, f"{key}: {len(values)} become {changed[-3:]}"


def kind_lie(rng, file):
    item = file.tensors[rng.integers(len(file.tensors))]
    was, item.kind = item.kind, int(rng.choice([0, 1, 2, 3, 8, 10, 12, 14, 24, 26, 30, 99, 2**31]))
    same = (was in (1, 30) and item.kind in (1, 30)) or was == item.kind
    return MAY if same else REFUSE, f"{item.name} is of kind {item.kind}, not {was}"


def offset_lie(rng, file):
    i = int(rng.integers(len(file.tensors)))
    at = sum(-(-len(item.data) // 32) * 32 for item in file.tensors[:i])
    lies = [at + 1, at + 32, at - 32, at + 2**20, 2**63, at // 2 + 5]
    file.tensors[i].offset = int(lies[rng.integers(len(lies))]) % 2**64
    return REFUSE, f"{file.tensors[i].name} at {file.tensors[i].offset}, not {at}"


def shape_lie(rng, file):
    item = file.tensors[rng.integers(len(file.tensors))]
    was = item.shape
    shapes = [
        [],
        [0],
        [*was, 1, 1, 1, 1],
        [2**62, 4],
        [2**40, *was],
        [was[0] + 1, *was[1:]],
        [1] * 9,
    ]
    item.shape = shapes[rng.integers(len(shapes))]
    return REFUSE, f"{item.name} of shape {item.shape}, not {was}"


def tensor_removed(rng, file):
    item = file.tensors.pop(rng.integers(len(file.tensors)))
    spare = item.name in ("output.weight", "rope_freqs.weight")
    return LOAD if spare else REFUSE, f"without {item.name}"


def tensor_twice(rng, file):
    item = file.tensors[rng.integers(len(file.tensors))]
    file.tensors.append(replace(item))
    return REFUSE, f"{item.name} twice"


def tensor_renamed(rng, file):
    item = file.tensors[rng.integers(len(file.tensors))]
    was = item.name
    item.name = str(rng.choice(["blk.7.attn_q.weight", "x", "", "blk.-1.ffn_up.weight", was + "s"]))
    return MAY if was in (
        "output.weight",
        "rope_freqs.weight",
    ) else REFUSE, f"{was} as {item.name!r}"


def bad_weight(rng, file):
    item = file.tensors[rng.integers(len(file.tensors))]
    code = {0: "<f", 1: "<e"}.get(item.kind)
    value = [float("nan"), float("inf"), -float("inf")][rng.integers(3)]
    raw = struct.pack(code, value) if code else struct.pack("<f", value)[2:]
    at = len(raw) * int(rng.integers(len(item.data) // len(raw)))
    item.data = item.data[:at] + raw + item.data[at + len(raw) :]
    return REFUSE, f"{item.name} holds {value}"


def quantised_garbage(rng, file):
    """Random bytes as blocks: scales may be anything, also NaN."""
    item = file.tensor("token_embd.weight")
    kind = [Q.Q8_0, Q.Q4_0, Q.Q5_1][rng.integers(3)]
    rows, width = item.shape[0], 32
    size = gguf.GGML_QUANT_SIZES[kind][1]
    item.kind, item.shape = int(kind), [rows, width]
    item.data = rng.integers(0, 256, rows * size, dtype=np.uint8).tobytes()
    return REFUSE, f"an embedding of random {kind.name} blocks, too wide"


def data_swapped(rng, file):
    a, b = rng.choice(len(file.tensors), 2, replace=False)
    a, b = file.tensors[a], file.tensors[b]
    a.name, b.name = b.name, a.name
    return (MAY if a.shape == b.shape else REFUSE), f"{a.name} and {b.name} swapped"


def alignment_lie(rng, file):
    value = [(U32, 64), (U32, 3), (U64, 2**40), (STRING, "32"), (U32, 8), (F32, 32.0)][
        rng.integers(6)
    ]
    file.set("general.alignment", *value)
    return MAY if value[1] in (8, 64) else REFUSE, f"general.alignment={value}"


def alignment_other(rng, file):
    file.align = 64
    file.set("general.alignment", U32, 64)
    return LOAD, "aligned to 64 bytes"


def version_other(rng, file):
    file.version = int(rng.choice([0, 1, 2, 4, 2**24 * 3]))
    return LOAD if file.version == 2 else REFUSE, f"version {file.version}"


def tail(rng, file):
    file.tail = bytes(int(rng.integers(64, 5000)))
    return REFUSE, f"{len(file.tail)} bytes more"


def invalid_text(rng, file):
    at = rng.choice([i for i, (_, kind, _) in enumerate(file.keys) if kind == STRING])
    file.keys[at] = (file.keys[at][0], STRING, b"\xff\xfe\x00")
    return MAY, f"{file.keys[at][0]} is no UTF-8"


CHANGES = [
    unchanged, unknown_key, never_a_value, another_type, for_each_block, another_number, far_too_large, not_finite,
    key_removed, key_twice, deep_arrays, length_lie, counts_lie, token_changed, merges_or_scores, kind_lie, offset_lie,
    shape_lie, tensor_removed, tensor_twice, tensor_renamed, bad_weight, quantised_garbage, data_swapped, alignment_lie,
    alignment_other, version_other, tail, invalid_text, another_type, another_number,
]  # fmt: skip


def mutant(seed: int, index: int) -> Mutant:
    """The mutant number `index` of a seed. Every third is damaged byte by byte, the others change what the file says."""
    rng = np.random.default_rng([seed, index, 1])
    file = good(rng)
    if index % 3 == 2:
        start = len(header(file)) if rng.random() < 0.2 else 0
        raw, must, what = damaged_bytes(rng, write(file), start, 0 if start else len(header(file)))
        return Mutant({"m.gguf": raw}, "m.gguf", must, what)
    change = CHANGES[(index - index // 3) % len(CHANGES)]
    must, what = change(rng, file)
    return Mutant({"m.gguf": write(file)}, "m.gguf", must, f"{change.__name__}: {what}")
