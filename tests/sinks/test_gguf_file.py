"""GGUF files are read to the bit, in Hugging Face's order, and a damaged or foreign one is a plain error.

Files are written by the gguf package's writer; K-quants, which it cannot make, are decoded here one value at a time.
"""

import contextlib
import math

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinks import gguf_file, loading
from sinks.config import RopeScaling
from sinks.gguf_file import llama_config, llama_tensors
from tests.fuzz import gguf_parts

HEADS, KV_HEADS, HEAD_DIM, WIDTH, HIDDEN, VOCAB = 4, 2, 8, 32, 64, 48
Q = gguf.GGMLQuantizationType


def weights(rng, depth=2):
    block = {
        "attn_norm": (WIDTH,),
        "attn_q": (HEADS * HEAD_DIM, WIDTH),
        "attn_k": (KV_HEADS * HEAD_DIM, WIDTH),
        "attn_v": (KV_HEADS * HEAD_DIM, WIDTH),
        "attn_output": (WIDTH, HEADS * HEAD_DIM),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }
    shapes = {"token_embd": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    return {
        f"{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(path, tensors, formats=None, architecture="llama", **keys):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(keys.pop("theta", 1000.0))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_array("some.floats", [0.5, 1.5])
    writer.add_array("some.strings", ["", "ä b"])
    for key, value in keys.items():
        key = key.replace("__", ".")
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)
    for name, tensor in tensors.items():
        kind = (formats or {}).get(name)
        if kind is None:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tensors():
    return weights(np.random.default_rng(0))


def test_metadata_become_the_models_sizes(tmp_path, tensors):
    path = write(tmp_path / "a.gguf", tensors)
    file = gguf_file.read(path)
    assert file.metadata["some.floats"] == [0.5, 1.5]
    assert file.metadata["some.strings"] == ["", "ä b"]
    c = llama_config(file, path)
    assert (c.family, c.vocab_size, c.width, c.depth) == ("llama", VOCAB, WIDTH, 2)
    assert (c.heads, c.kv_heads, c.head_dim, c.mlp_dim) == (HEADS, KV_HEADS, HEAD_DIM, HIDDEN)
    assert (c.rope_theta, c.rope_fraction, c.max_positions) == (1000, 1, 256)
    assert (c.tie_embeddings, c.bos_id, c.eos_ids) == (True, 1, (2,))
    assert c.norm_eps == pytest.approx(1e-5) and c.rope_scaling is None


def test_tensors_come_back_under_hugging_faces_names(tmp_path, tensors):
    file = gguf_file.read(path := write(tmp_path / "a.gguf", tensors))
    got = llama_tensors(file, llama_config(file, path))
    assert len(got) == len(tensors)
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.1.self_attn.v_proj.weight", "blk.1.attn_v.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    ):
        assert got[ours].shape == tensors[theirs].shape
        np.testing.assert_array_equal(got[ours].read(), tensors[theirs])


def test_ropes_features_come_back_half_a_head_apart(tmp_path, tensors):
    """The converter puts feature i of the first half at 2i, and of the second at 2i + 1, in every head."""
    original = {}
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        rows = original[name] = np.arange(heads * HEAD_DIM * WIDTH, dtype=np.float32).reshape(
            -1, WIDTH
        )
        converted = np.empty_like(rows)
        for h in range(heads):
            for half in range(2):
                for i in range(HEAD_DIM // 2):
                    source = h * HEAD_DIM + half * HEAD_DIM // 2 + i
                    converted[h * HEAD_DIM + 2 * i + half] = rows[source]
        tensors[f"blk.1.attn_{name}.weight"] = converted
    file = gguf_file.read(path := write(tmp_path / "a.gguf", tensors))
    got = llama_tensors(file, llama_config(file, path))
    for name, rows in original.items():
        np.testing.assert_array_equal(
            got[f"model.layers.1.self_attn.{name}_proj.weight"].read(), rows
        )


@pytest.mark.parametrize(
    "kind, step",
    [
        (Q.F16, 1e-3),
        (Q.BF16, 1e-2),
        (Q.Q8_0, 2e-2),
        (Q.Q4_0, 0.5),
        (Q.Q4_1, 0.25),
        (Q.Q5_0, 0.25),
        (Q.Q5_1, 0.12),
    ],
)
def test_quantised_tensors_are_near_what_was_written(tmp_path, tensors, kind, step):
    name = "blk.0.ffn_down.weight"
    file = gguf_file.read(write(tmp_path / "a.gguf", tensors, {name: kind}))
    got = file.tensors[name].read()
    assert got.dtype == np.float32 and got.shape == tensors[name].shape
    error = np.abs(got - tensors[name]).max()
    assert 0 < error < step


def half(block, at):
    return float(np.frombuffer(bytes(block[at : at + 2]), np.float16)[0])


def q45_k(block, five):
    """256 values: scale and minimum of fp16, eight pairs of 6-bit scales in 12 bytes, for Q5_K 32 bytes of fifth bits,
    128 bytes of nibbles."""
    d, low, s = half(block, 0), half(block, 2), [int(b) for b in block[4:16]]
    values = []
    for j in range(8):
        if j < 4:
            scale, minimum = s[j] & 63, s[j + 4] & 63
        else:
            scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4
            minimum = (s[j + 4] >> 4) | (s[j] >> 6) << 4
        for k in range(32):
            byte = int(block[16 + 32 * five + 32 * (j // 2) + k])
            q = byte >> 4 * (j % 2) & 15
            if five:
                q += 16 * (int(block[16 + k]) >> j & 1)
            values.append(d * scale * q - low * minimum)
    return values


def q4_k(block):
    return q45_k(block, False)


def q5_k(block):
    return q45_k(block, True)


def q6_k(block):
    """256 values: 128 bytes of low nibbles, 64 of high pairs, 16 int8 scales, fp16 scale (docs/papers/streamingllm.md 7)."""
    d = half(block, 208)
    scales = np.frombuffer(bytes(block[192:208]), np.int8)
    values = []
    for e in range(256):
        h, g, k = e // 128, e // 32 % 4, e % 32
        byte = int(block[64 * h + 32 * (g % 2) + k])
        low = byte & 15 if g < 2 else byte >> 4
        high = int(block[128 + 32 * h + k]) >> 2 * g & 3
        values.append(d * float(scales[e // 16]) * ((low | high << 4) - 32))
    return values


@pytest.mark.parametrize("kind, decode, size, halves", [
    (Q.Q4_K, q4_k, 144, (0, 2)), (Q.Q5_K, q5_k, 176, (0, 2)),
    (Q.Q6_K, q6_k, 210, (208,)),
])  # fmt: skip
def test_k_quants_decode_value_by_value(tmp_path, kind, decode, size, halves):
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (3, 2 * size), dtype=np.uint8)
    for start in (0, size):
        for at in halves:
            scale = rng.uniform(0.01, 1, 3).astype(np.float16)
            blocks[:, start + at : start + at + 2] = scale[:, None].view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("x", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = gguf_file.read(tmp_path / "k.gguf").tensors["x"]
    assert got.shape == (3, 512)
    want = [decode(row[:size]) + decode(row[size:]) for row in blocks]
    np.testing.assert_allclose(got.read(), want, rtol=1e-5, atol=1e-5)


def test_llama_3s_frequencies_are_recognised(tmp_path, tensors):
    """The table as the Llama 3.1 paper's code makes it: slow waves divided by 8, fast ones kept, a line between."""
    theta, table = 500_000.0, []
    for i in range(HEAD_DIM // 2):
        wave = 2 * math.pi * theta ** (2 * i / HEAD_DIM)
        if wave < 8192 / 4:
            table.append(1.0)
        elif wave > 8192 / 1:
            table.append(8.0)
        else:
            smooth = (8192 / wave - 1) / 3
            table.append(1 / ((1 - smooth) / 8 + smooth))
    assert 1.0 in table and 8.0 in table
    tensors["rope_freqs.weight"] = np.float32(table)
    file = gguf_file.read(path := write(tmp_path / "a.gguf", tensors, theta=theta))
    config = llama_config(file, path)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("llama3", 8)
    assert not any("rope" in name for name in llama_tensors(file, config))

    tensors["rope_freqs.weight"] = np.float32([1, 2, 3, 8])
    file = gguf_file.read(path := write(tmp_path / "b.gguf", tensors, theta=theta))
    with pytest.raises(ValueError, match="not Llama 3's with factor 8"):
        llama_config(file, path)


def test_rope_scaling_that_depends_on_the_length_is_refused(tmp_path, tensors):
    path = write(tmp_path / "a.gguf", tensors, llama__rope__scaling__type="yarn")
    with pytest.raises(ValueError, match="rope scaling 'yarn' is not supported"):
        llama_config(gguf_file.read(path), path)


def test_other_architectures_and_formats_are_named(tmp_path, tensors):
    path = write(tmp_path / "a.gguf", tensors, architecture="gemma3")
    with pytest.raises(ValueError, match=r"architecture 'gemma3': of GGUF files, 'llama' can"):
        llama_config(gguf_file.read(path), path)
    path = write(tmp_path / "b.gguf", tensors)
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    assert data[at : at + 4] == bytes(4)  # F32
    data[at] = Q.IQ4_XS
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight: format IQ4_XS cannot be read"):
        gguf_file.read(path)


def test_foreign_files_are_refused(tmp_path):
    for content, message in ((b"", "is empty"), (b"PK\3\4" + bytes(99), "no GGUF file: it begins")):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            gguf_file.read(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"GGUF\0\0\0\3" + bytes(99))
    with pytest.raises(ValueError, match=r"version 50331648: 2 and 3 \(little-endian\)"):
        gguf_file.read(tmp_path / "x")


def test_a_truncated_file_names_what_is_cut(tmp_path, tensors):
    path = write(tmp_path / "a.gguf", tensors)
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    with pytest.raises(ValueError, match=r"ends inside its header \(500 bytes\)"):
        gguf_file.read(path)
    path.write_bytes(whole[:-3000])
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_down\.weight: its values end at byte"):
        gguf_file.read(path)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damage_anywhere_in_the_header_is_one_plain_error_or_none(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damage"
    folder.mkdir(exist_ok=True)
    if not (folder / "a.gguf").exists():
        write(folder / "a.gguf", weights(np.random.default_rng(0)))
    raw = bytearray((folder / "a.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 2200))] = data.draw(st.integers(0, 255))
    (folder / "b.gguf").write_bytes(raw)
    with contextlib.suppress(ValueError):
        gguf_file.read(folder / "b.gguf")


def parts():
    """The good file of the fuzz, which can be made to lie."""
    return gguf_parts.good(np.random.default_rng(1))


def refused(tmp_path, file, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_parts.write(file))
    with pytest.raises(ValueError, match=rf"(?s)m\.gguf.*{message}") as caught:
        loading.load(path, check=False)
    assert type(caught.value) is ValueError and loading.UNFORESEEN not in str(caught.value)


def key(name, kind, value):
    def change(file):
        file.set(name, kind, value)

    return change


def tensor(name, /, **changes):
    def change(file):
        for what, value in changes.items():
            setattr(file.tensor(name), what, value)

    return change


def swap(file):
    file.tensor("blk.0.attn_q.weight").offset = 0


U32, F32, STRING, ARRAY, I32 = 4, 6, 8, 9, 5


@pytest.mark.parametrize("change, message", [
    (key("llama.attention.head_count", U32, 0), "head_count=0, it must be a whole number from 1"),
    (key("llama.attention.head_count", U32, 3), "embedding_length=16 is no multiple of .*head_count=3"),
    (key("llama.attention.head_count", ARRAY, (I32, [4, 4])), r"head_count=\[4, 4\], it must be a whole"),
    (key("llama.attention.head_count_kv", ARRAY, (I32, [2, 2])), r"head_count_kv=\[2, 2\], it must"),
    (key("llama.attention.head_count", STRING, "4"), "head_count='4', it must be"),
    (key("llama.embedding_length", U32, 0), "embedding_length=0"),
    (key("llama.attention.key_length", U32, 0), "key_length=0"),
    (key("llama.attention.value_length", U32, 3), "value_length=3: values must be as wide as keys"),
    (key("llama.block_count", U32, 10**6), "1000000 blocks, and there are .* tensors"),
    (key("llama.block_count", U32, 4 * 10**9), "block_count=4000000000"),
    (key("llama.feed_forward_length", U32, 2**31 - 1), "blk.0.ffn_gate.weight is .* needs .2147483647"),
    (key("llama.attention.layer_norm_rms_epsilon", F32, float("nan")), "epsilon=nan, it must be a number above 0"),
    (key("llama.attention.layer_norm_rms_epsilon", STRING, "x"), "epsilon='x'"),
    (key("llama.rope.freq_base", F32, 0.0), "freq_base=0.0, it must be a number above 1"),
    (key("llama.rope.freq_base", F32, float("inf")), "freq_base=inf"),
    (key("llama.rope.dimension_count", U32, 8), "dimension_count=8: a head has 4 features"),
    (key("tokenizer.ggml.bos_token_id", U32, 10**9), "bos_token_id=1000000000"),
    (key("tokenizer.ggml.eos_token_id", STRING, "2"), "eos_token_id='2'"),
    (key("general.more", ARRAY, gguf_parts.nested(5000)), "general.more with arrays in arrays"),
    (key("general.alignment", U32, 3), "alignment=3, it must be a power of two"),
    (key("general.alignment", F32, 32.0), "alignment=32.0, it must be"),
    (key("split.count", U32, 3), "one of 3 parts of a model: join them"),
    (tensor("output_norm.weight", shape=[]), "output_norm.weight has 0 axes"),
    (tensor("output_norm.weight", shape=[2**62, 16]), "output_norm.weight: its values end at byte"),
    (tensor("output_norm.weight", offset=17), "output_norm.weight: its values begin at byte .*, and not at"),
    (swap, "its values begin at byte .* the header is damaged"),
    (tensor("output_norm.weight", name="token_embd.weight"), "token_embd.weight: there are two of this name"),
    (tensor("output_norm.weight", name="x\x1b[2J"), "name of 5 characters"),
    (tensor("output_norm.weight", data=np.full(16, np.nan, np.float32).tobytes()), "output_norm.weight holds .* NaN"),
], ids=lambda value: "" if callable(value) else value)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(tmp_path, change, message):
    file = parts()
    change(file)
    refused(tmp_path, file, message)


def test_a_format_that_does_not_fill_the_file_is_noticed(tmp_path):
    """Of fewer bytes than the values take, the rest would be nobody's."""
    for name in ("blk.0.ffn_down.weight", parts().tensors[-1].name):
        file = parts()
        file.tensor(name).kind = int(Q.F16)
        refused(tmp_path, file, "the header is damaged|belong to none")


@pytest.mark.parametrize("keys, want", [
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
    ({"rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
    ({"rope.scale_linear": 4.0}, RopeScaling("linear", 4.0)),
    ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ({"rope.scaling.type": "linear"}, None),
    ({"rope.scaling.factor": 0.0}, None),
])  # fmt: skip
def test_a_factor_without_a_type_is_linear(tmp_path, tensors, keys, want):
    keys = {f"llama.{key}".replace(".", "__"): value for key, value in keys.items()}
    path = write(tmp_path / "a.gguf", tensors, **keys)
    assert llama_config(gguf_file.read(path), path).rope_scaling == want
