"""Ways to damage a Hugging Face folder."""

import json
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from sinks.weights import INDEX
from tests.fuzz.folder_parts import (
    CONFIG,
    GENERATION,
    JSON,
    NEVER,
    TEMPLATE,
    WORDS,
    WORDS_CONFIG,
    Files,
    good,
    to_bytes,
)  # fmt: skip
from tests.fuzz.mutant import LOAD, MAY, REFUSE, Mutant, damaged_bytes
from tests.sinks.checkpoints import CHATML


def shards(files: Files) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


def _pick(rng: np.random.Generator, values: Any) -> Any:
    values = list(values)
    return values[rng.integers(len(values))]


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to everything in a JSON value; of a long list or object, to a few."""
    out = [path] if path else []
    if isinstance(value, dict):
        for key in list(value)[:40]:
            out += _places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(3, len(value))):
            out += _places(value[i], (*path, i))
    return out


VALUES = [
    None, True, False, "x", "yes", "true", "", [], {}, [1], -1, 0, 1, 1.5, 3, 255, 2**31, 10**12, 10**40, -(10**40),
    float("inf"), float("nan"), 1e-300, [[[1]]], {"a": {"b": 1}}, "\ud800", ["a", None], [None],
]  # fmt: skip


def _replace(rng: np.random.Generator, files: Files, name: str) -> str:
    path = _pick(rng, _places(files[name]))
    parent = files[name]
    for key in path[:-1]:
        parent = parent[key]
    value = _pick(rng, VALUES)
    if isinstance(value, str) and "\ud800" in value:
        value = "\N{REPLACEMENT CHARACTER}"
    parent[path[-1]] = value
    return f"{name}: {'.'.join(map(str, path))}={value!r}"


# Each takes a random generator and a good folder, changes it, and returns what must happen and a description.


def unchanged(rng, files):
    return LOAD, "unchanged"


def extra(rng, files):
    files[CONFIG] |= {"whatever": _pick(rng, VALUES[:12]), "more": {"a": [1]}}
    files["README.md"] = "hello"
    files["consolidated.txt"] = b"\0"
    return LOAD, "more keys and files"


def null_of_real_files(rng, files):
    if files[CONFIG]["model_type"] != "llama":
        return LOAD, "unchanged"
    key = _pick(
        rng, ["sliding_window", "head_dim", "rope_scaling", "quantization_config", "bos_token_id"]
    )
    files[CONFIG][key] = None
    return LOAD, f"{key}=null"


def never_in_config(rng, files):
    key, value = _pick(rng, NEVER[files[CONFIG]["model_type"]])
    files[CONFIG][key] = value
    return REFUSE, f"config.json: {key}={value!r}"


def config_key_removed(rng, files):
    key = _pick(rng, files[CONFIG])
    del files[CONFIG][key]
    needed = key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "d_model")
    return REFUSE if needed else MAY, f"config.json without {key}"


def config_replaced(rng, files):
    return MAY, _replace(rng, files, CONFIG)


def json_replaced(rng, files):
    return MAY, _replace(rng, files, _pick(rng, [name for name in JSON if name in files]))


def words_replaced(rng, files):
    return MAY, _replace(rng, files, WORDS)


def settings_replaced(rng, files):
    return MAY, _replace(rng, files, _pick(rng, [GENERATION, WORDS_CONFIG]))


def no_object(rng, files):
    name = _pick(rng, [name for name in JSON if name in files])
    files[name] = _pick(
        rng, ["", "null", "[]", "3", '"x"', "{", "[" * 100_000, "\0", b"\xff\xfe{}", "1" * 10_000]
    )
    return REFUSE, f"{name} is {files[name][:10]!r}"


def file_removed(rng, files):
    name = _pick(rng, files)
    del files[name]
    spare = (GENERATION, WORDS_CONFIG, TEMPLATE, INDEX)
    return LOAD if name in spare else REFUSE, f"without {name}"


def ids(rng, files):
    value = _pick(rng, [10**9, -1, "2", 2.0, [2, None], [[2]], {"a": 1}, True, 263])
    files[GENERATION]["eos_token_id"] = value
    return REFUSE, f"generation_config.json: eos_token_id={value!r}"


def special_token(rng, files):
    key, value = (
        _pick(rng, ["bos_token", "eos_token"]),
        _pick(rng, ["<nobody>", 3, [], {"content": 3}, {}, True]),
    )
    files[WORDS_CONFIG][key] = value
    return REFUSE, f"tokenizer_config.json: {key}={value!r}"


def template(rng, files):
    value = _pick(rng, [3, {}, ["x"], [{"name": "a"}], True, [{"name": 1, "template": "x"}]])
    files[WORDS_CONFIG]["chat_template"] = value
    return REFUSE, f"chat_template={value!r}"


def template_text(rng, files):
    files.pop(TEMPLATE, None)
    texts = ["{% if %}", "{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{% for m in messages %}", "{{ x.y.z }}", "{{ messages[9].a }}",
             "{" * 5000, "{{ " + "(" * 3000 + ")" * 3000 + " }}", "{{ 'a' * 10**12 }}", "{{ ''.__class__ }}",
             "{% include 'config.json' %}", "{{ range(10**12) | list }}"]  # fmt: skip
    files[WORDS_CONFIG]["chat_template"] = _pick(rng, texts)
    return MAY, f"chat_template={files[WORDS_CONFIG]['chat_template'][:30]!r}"


def template_bytes(rng, files):
    files[TEMPLATE] = b"\xff" + CHATML.encode()
    return REFUSE, "chat_template.jinja is no UTF-8"


def merges_dropped(rng, files):
    files[WORDS]["model"]["merges"] = []
    return REFUSE, "tokenizer.json without merges"


def token_id(rng, files):
    words = files[WORDS]["model"]["vocab"]
    words[_pick(rng, words)] = int(_pick(rng, [10**6, 2**32 - 1, 2**31, 5]))
    return MAY, "tokenizer.json: a token with another id"


def other_kind(rng, files):
    """Weights that are no floats."""
    file = _pick(rng, shards(files))
    name = _pick(rng, files[file])
    kind = _pick(
        rng, [np.bool_, np.int32, np.int64, np.uint8, np.complex64, ml_dtypes.float8_e4m3fn]
    )
    files[file][name] = np.asarray(files[file][name], np.float32).astype(kind)
    return REFUSE, f"{name} is {np.dtype(kind).name}"


def bad_weight(rng, files):
    file = _pick(rng, shards(files))
    name = _pick(rng, files[file])
    value = _pick(rng, [np.nan, np.inf, -np.inf])
    files[file][name].reshape(-1)[rng.integers(files[file][name].size)] = value
    return REFUSE, f"{name} holds {value}"


def doubles(rng, files):
    too_large = rng.random() < 0.3
    file = _pick(rng, shards(files))
    name = _pick(rng, files[file])
    files[file][name] = files[file][name].astype(np.float64)
    if too_large:
        files[file][name].reshape(-1)[0] = 1e300
    return (REFUSE if too_large else LOAD), f"{name} in float64{', too large' * too_large}"


def tensors_changed(rng, files):
    file = _pick(rng, shards(files))
    there = files[file]
    name, other = (str(n) for n in rng.choice(list(there), 2, replace=False))
    kind = rng.integers(5)
    if kind == 0:
        del there[name]
        return REFUSE, f"without {name}"
    if kind == 1:
        there[str(_pick(rng, ["x", name + "s", name.replace("1", "9") + "x"]))] = there.pop(name)
        return REFUSE, f"{name} renamed"
    if kind == 2:
        same = there[name].shape == there[other].shape
        there[name], there[other] = there[other], there[name]
        return MAY if same else REFUSE, f"{name} and {other} swapped"
    if kind == 3:
        there["model.layers.0.more.weight"] = there[name]
        return REFUSE, "one tensor too many"
    there[name] = _pick(
        rng, [there[name][:-1], there[name][None], there[name][:0], there[name].reshape(-1)[:1]]
    )
    return REFUSE, f"{name} of shape {there[name].shape}"


def twice(rng, files):
    if INDEX not in files:
        return LOAD, "unchanged"
    a, b = shards(files)
    name = _pick(rng, files[a])
    files[b][name] = files[a][name]
    return REFUSE, f"{name} in two files"


def index(rng, files):
    if INDEX not in files:
        return LOAD, "unchanged"
    first = shards(files)[0]
    files["secret.safetensors"] = files[first]
    names = [f"../{first}", f"a/../{first}", f"./{first}", f"/{first}", f"..\\{first}", 3, None, "", [first], first[:-1],
             "config.json", "no.safetensors", "a\0.safetensors", {"a": 1}]  # fmt: skip
    name = _pick(rng, names)
    files[INDEX]["weight_map"][_pick(rng, files[INDEX]["weight_map"])] = name
    if rng.random() < 0.3:
        files[INDEX] = _pick(
            rng, [{}, {"weight_map": {}}, {"weight_map": [first]}, {"weight_map": None}]
        )
    return REFUSE, f"the index names {name!r}, or is {str(files[INDEX])[:30]}"


def header_lie(rng, files):
    """The safetensors header says something else about the same bytes."""
    file = _pick(rng, shards(files))
    raw = save(files[file])
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + n])
    name = _pick(rng, [key for key in header if key != "__metadata__"])
    was = json.dumps(header[name])
    kinds = {
        "F32": ["I32", "U32", "F16", "XX", 3],
        "F16": ["I16", "U16", "F8_E4M3", None],
        "BF16": ["I16", "U16", "F32"],
    }
    entry = header[name]
    if (kind := rng.integers(4)) == 0:
        entry["dtype"] = _pick(rng, kinds[entry["dtype"]])
    elif kind == 1:
        entry["shape"] = _pick(
            rng, [[], [0], [2**62, 4], [-1], ["16"], None, [*entry["shape"], 2], [1.5]]
        )
    elif kind == 2:
        a, b = entry["data_offsets"]
        entry["data_offsets"] = _pick(
            rng, [[b, a], [a, b + 1], [a + 1, b], [0, b + 5], [2**63, 2**63], [a], None]
        )
    else:
        header[name] = _pick(rng, [None, [], 3, "x", {}])
    text = json.dumps(header).encode()
    files[file] = struct.pack("<Q", len(text)) + text + raw[8 + n :]
    return REFUSE, f"{file}: {name} is {json.dumps(header[name])}, not {was}"


def header_length(rng, files):
    file = _pick(rng, shards(files))
    raw = save(files[file])
    n = struct.unpack("<Q", raw[:8])[0]
    lie = int(_pick(rng, [0, 1, n - 1, n + 1, n + 8, 2**31, 2**63, 2**64 - 1, len(raw)]))
    files[file] = struct.pack("<Q", lie) + raw[8:]
    return REFUSE, f"{file} with a header of {lie} instead of {n} bytes"


def tail(rng, files):
    file = _pick(rng, shards(files))
    files[file] = save(files[file]) + bytes(int(rng.integers(1, 100)))
    return REFUSE, f"{file} with bytes behind its end"


def _damaged(names: Callable[[Files], list[str]]) -> Callable:
    def damaged(rng, files):
        name = _pick(rng, names(files))
        raw = to_bytes({name: files[name]})[name]
        header = 8 + struct.unpack("<Q", raw[:8])[0] if name.endswith(".safetensors") else 0
        files[name], must, what = damaged_bytes(rng, raw, 0, header)
        return MAY if name == TEMPLATE else must, f"{name}: {what}"

    return damaged


CHANGES = [
    unchanged, extra, null_of_real_files, never_in_config, config_key_removed, config_replaced, json_replaced,
    words_replaced, settings_replaced, no_object, file_removed, ids, special_token, template, template_text,
    template_bytes, merges_dropped, token_id, other_kind, bad_weight, doubles, tensors_changed, twice, index, header_lie,
    header_length, tail, never_in_config, never_in_config, config_replaced, header_lie, tensors_changed,
]  # fmt: skip
DAMAGE = [_damaged(shards), _damaged(lambda files: [n for n in files if n not in shards(files)])]


def mutant(seed: int, index: int) -> Mutant:
    """The mutant number `index` of a seed. Every third is damaged byte by byte, the others change what the files say."""
    rng = np.random.default_rng([seed, index, 2])
    files = good(rng)
    change = (
        DAMAGE[index // 3 % 2] if index % 3 == 2 else CHANGES[(index - index // 3) % len(CHANGES)]
    )
    must, what = change(rng, files)
    return Mutant(to_bytes(files), "", must, f"{change.__name__}: {what}")
