"""`sinks.load` finds, fills and tries a model, and refuses one that would only look right."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sinks
from common.mesh import MeshSpec, make_mesh
from sinks import hub, loading, params, stream, tokenizer_files
from sinks.cache import CacheSpec
from sinks.config import ModelConfig
from tests.sinks.checkpoints import (
    LLAMA,
    D,
    F,
    H,
    K,
    V,
    byte_level_folder,
    byte_level_metadata,
    save,
    save_tokenizer,
    tensors,
)

TOKENIZER = tokenizer_files.from_gguf(byte_level_metadata())
CONFIG = ModelConfig(
    family="llama",
    vocab_size=V,
    width=32,
    depth=2,
    heads=2,
    kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    max_positions=1024,
    rope_theta=100.0,
)


def save_gguf(path, there, vocabulary=None):
    """The checkpoint as llama.cpp's converter would write it."""
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500.0)
    metadata = vocabulary or byte_level_metadata()
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    for name, tensor in there.items():
        if "q_proj" in name or "k_proj" in name:
            tensor = tensor.reshape(-1, 2, K // 2, D).swapaxes(1, 2).reshape(tensor.shape)
        name = name.replace("model.layers.", "blk.").removesuffix(".weight")
        for theirs, llama_cpp in names.items():
            name = name.replace(theirs, llama_cpp)
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
def test_a_folder_and_the_gguf_made_from_it_are_one_model(tmp_path):
    there = tensors(LLAMA)
    save_tokenizer(save(tmp_path / "a", LLAMA, there))
    (tmp_path / "b").mkdir()
    path = save_gguf(tmp_path / "b" / "m.gguf", there)
    folder = sinks.load(tmp_path / "a", check=False)
    file = sinks.load(path, check=False)
    jax.tree.map(np.testing.assert_array_equal, folder.params, file.params)
    ids = folder.tokenizer.encode("the 12 é")
    assert ids == file.tokenizer.encode("the 12 é")
    assert (file.tokenizer.bos_id, file.tokenizer.eos_ids) == (1, (2,))
    assert (folder.tokenizer.bos_id, folder.tokenizer.eos_ids) == (1, (2,))
    same = ("family", "vocab_size", "width", "depth", "heads", "kv_heads", "head_dim", "rope_theta")
    for name in (*same, "mlp_dim", "rope_fraction", "tie_embeddings", "attention_bias"):
        assert getattr(folder.config, name) == getattr(file.config, name), name

    config, values, _ = sinks.load(str(tmp_path / "b"), check=False)  # the folder of one GGUF file
    assert config == file.config
    spec = CacheSpec(sinks=0, recent=len(ids))
    assert jnp.isfinite(stream.hidden_from_start(config, values, spec, jnp.asarray([ids]))).all()
    save_gguf(tmp_path / "b" / "n.gguf", there)
    with pytest.raises(ValueError, match=r"several GGUF files, name one of them: m\.gguf, n\.gguf"):
        sinks.load(tmp_path / "b")


def test_a_tokenizer_beside_a_gguf_file_comes_first(tmp_path):
    odd = byte_level_metadata(pre="an-unknown-one")
    path = save_gguf(tmp_path / "m.gguf", tensors(LLAMA), odd)
    with pytest.raises(ValueError, match=r"pre='an-unknown-one'.*tokenizer\.json next to"):
        sinks.load(path, check=False)
    save_tokenizer(tmp_path)
    assert sinks.load(path, check=False).tokenizer.encode("h") == TOKENIZER.encode("h")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    there = tensors(LLAMA)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        there[name] = there[name][:100]
    save_tokenizer(save(tmp_path, {**LLAMA, "vocab_size": 100}, there))
    with pytest.raises(ValueError, match="knows 263 tokens, its weights 100"):
        sinks.load(tmp_path)


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(
        ValueError, match=r"'smollm-135m' is no file.*did you mean 'smollm2-135m'\?"
    ):
        sinks.load("smollm-135m")
    with pytest.raises(ValueError, match="is no file, no folder, no model on the hub"):
        sinks.load(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt is no GGUF file: it begins with b'hell'"):
        sinks.load(tmp_path / "notes.txt")


def test_a_model_is_spread_over_a_mesh(tmp_path):
    folder = save(tmp_path, LLAMA, tensors(LLAMA))
    _, whole = loading.load_weights(folder)
    mesh = make_mesh(MeshSpec(replica=1, fsdp=4, tensor=2))
    _, spread = loading.load_weights(folder, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, spread, whole)
    shard = spread["blocks"]["q"].addressable_shards[0].data
    assert shard.shape == (2, D // 4, H * K // 2)
    save(tmp_path, {**LLAMA, "num_key_value_heads": 1}, {})
    with pytest.raises(ValueError, match="blocks/k"):
        loading.load_weights(folder, mesh=make_mesh(MeshSpec(replica=1, fsdp=1, tensor=8)))


def test_a_known_name_is_fetched(tmp_path, monkeypatch):
    path = save_gguf(tmp_path / "m.gguf", tensors(LLAMA))
    monkeypatch.setattr(hub, "fetch", lambda name: path if name == "smollm2-135m" else None)
    config, values, text = sinks.load("smollm2-135m", check=False, dtype="bfloat16")
    assert config.width == D and values["embed"].dtype == jnp.bfloat16 and text.bos_id == 1


@pytest.mark.parametrize("dtype", ["int8", "float64", "float16", "foo", np.int8, None, 3])
def test_a_type_that_weights_do_not_load_in_is_refused(tmp_path, dtype):
    folder = byte_level_folder(tmp_path / "m")
    for load in (sinks.load, loading.load_weights):
        with pytest.raises(ValueError, match="parameters load as float32 or bfloat16") as caught:
            load(folder, dtype=dtype)
    assert ("prepare(params, int8=True)" in str(caught.value)) == (dtype in ("int8", np.int8))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, "bfloat16"])
def test_a_type_may_be_given_as_such(tmp_path, dtype):
    _, values = loading.load_weights(byte_level_folder(tmp_path / "m"), dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(values)} == {jnp.dtype(dtype)}


def test_misfits_are_told_in_the_files_own_names(tmp_path):
    there = tensors(LLAMA)
    del there["model.embed_tokens.weight"]
    folder = save(tmp_path / "folder", LLAMA, there)
    with pytest.raises(
        ValueError, match=r"folder: .*describes: missing: model\.embed_tokens\.weight$"
    ):
        loading.load_weights(folder)
    there = tensors(LLAMA)
    there["model.layers.0.self_attn.q_proj.weight"] = np.zeros((D, D + K), np.float32)[:, :D]
    del there["model.layers.1.mlp.down_proj.weight"]
    path = save_gguf(tmp_path / "m.gguf", there)
    with pytest.raises(ValueError, match=r"m\.gguf: .*: missing: blk\.1\.ffn_down\.weight$"):
        loading.load_weights(path)


def test_an_error_that_no_check_foresaw_names_the_file(tmp_path, monkeypatch):
    folder = byte_level_folder(tmp_path / "m")
    for error in (TypeError("x" * 3), ValueError("no file's name in it"), MemoryError("1 TiB")):

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(loading.hf_config, "model_config", fails)
        with pytest.raises(ValueError, match=rf"m cannot be loaded: .*{error}") as caught:
            sinks.load(folder)
        assert type(caught.value) is ValueError and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def reader():
    """A small model that has learned the paragraph by heart."""
    ids = jnp.asarray([[TOKENIZER.bos_id, *TOKENIZER.encode(loading.PARAGRAPH)[:256]]])
    values = params.init(CONFIG, jax.random.key(0))
    adam = optax.adam(1e-2)
    spec = CacheSpec(sinks=0, recent=ids.shape[1])

    def loss(values):
        x = stream.hidden_from_start(CONFIG, values, spec, ids[:, :-1])
        logits = stream.unembed(CONFIG, values, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    @jax.jit
    def step(values, state):
        gradient = jax.grad(loss)(values)
        updates, state = adam.update(gradient, state, values)
        return optax.apply_updates(values, updates), state

    state = adam.init(values)
    for _ in range(150):
        values, state = step(values, state)
    return values


@pytest.fixture
def short(monkeypatch):
    text = TOKENIZER.decode(TOKENIZER.encode(loading.PARAGRAPH)[:256])
    monkeypatch.setattr(loading, "PARAGRAPH", text)


@pytest.mark.slow
def test_a_model_that_reads_passes(reader, short):
    assert loading.check_reading(CONFIG, reader, TOKENIZER) < 5


@pytest.mark.parametrize("theirs", ["side by side", "half a head apart"])
def test_ropes_features_in_the_wrong_order_are_told_apart(reader, short, theirs):
    """What a forgotten, and what a repeated reordering of q and k makes of a file."""
    heads = {k: np.asarray(reader["blocks"][k]).reshape(2, 32, 2, 16) for k in "qk"}
    if theirs == "side by side":
        wrong = {
            k: w.reshape(2, 32, 2, 2, 8).swapaxes(-1, -2).reshape(2, 32, 32)
            for k, w in heads.items()
        }
    else:
        wrong = {
            k: w.reshape(2, 32, 2, 8, 2).swapaxes(-1, -2).reshape(2, 32, 32)
            for k, w in heads.items()
        }
    values = {**reader, "blocks": reader["blocks"] | wrong}
    with pytest.raises(
        ValueError, match="features that RoPE rotates are in the wrong order: perplex"
    ):
        loading.check_reading(CONFIG, values, TOKENIZER, "m.gguf")


def test_a_model_that_answers_nan_is_refused(short):
    values = params.init(CONFIG, jax.random.key(1))
    values["unembed"] = values["unembed"] * 3e38  # finite, and its products are not
    with pytest.raises(ValueError, match=r"m\.gguf: .* is NaN: its weights are damaged"):
        loading.check_reading(CONFIG, values, TOKENIZER, "m.gguf")


def test_an_untrained_model_is_not_blamed_for_its_features_order(short, monkeypatch):
    """Whatever order it has, chance makes one of them a little better."""
    other = iter([400.0, 300.0, 250.0])
    monkeypatch.setattr(loading, "_perplexity", lambda *_: next(other))
    with pytest.warns(UserWarning, match="reads English badly"):
        loading.check_reading(CONFIG, params.init(CONFIG, jax.random.key(0)), TOKENIZER)


def test_a_model_that_reads_nothing_is_only_warned_about(short):
    values = params.init(CONFIG, jax.random.key(1))
    with pytest.warns(
        UserWarning, match=r"reads English badly.*by lot has 264\. That is right for an untrained"
    ):
        assert loading.check_reading(CONFIG, values, TOKENIZER) > 200


def test_what_is_no_regular_file_is_named():
    with pytest.raises(ValueError, match=r"^/dev/null is no regular file"):
        sinks.load("/dev/null")
