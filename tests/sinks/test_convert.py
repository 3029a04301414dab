"""Checkpoints of every family land where they belong, and whatever does not fit is said at once.

tests/peers compares with live models.
"""

import re
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from sinks import params as layouts
from sinks import weights
from sinks.config import RopeScaling
from sinks.hf_config import model_config
from sinks.loading import load_weights
from tests.sinks.checkpoints import (
    CONFIGS,
    FALCON_7B,
    FALCON_40B,
    LLAMA,
    MPT,
    NEOX,
    D,
    F,
    H,
    K,
    L,
    V,
    save,
    tensors,
)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_has_its_place(family, files, tmp_path):
    """All of the model is filled, and all of the file is in it, whatever the order."""
    there = tensors(CONFIGS[family])
    config, params = load_weights(save(tmp_path, CONFIGS[family], there, files))
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, layouts.abstract(config)
    )
    got = np.sort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)]))
    np.testing.assert_array_equal(got, np.sort(np.concatenate([x.ravel() for x in there.values()])))


def test_kernels_are_inputs_by_outputs(tmp_path):
    there = tensors(LLAMA)
    _, params = load_weights(save(tmp_path, LLAMA, there))
    blocks = params["blocks"]
    for ours, theirs in (
        ("q", "self_attn.q_proj"),
        ("o", "self_attn.o_proj"),
        ("down", "mlp.down_proj"),
        ("attn_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
    ):
        np.testing.assert_array_equal(blocks[ours][1], there[f"model.layers.1.{theirs}.weight"].T)
    np.testing.assert_array_equal(params["embed"], there["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["unembed"], there["lm_head.weight"].T)


@pytest.mark.parametrize(
    "config, name, order",
    [
        (NEOX, "gpt_neox.layers.1.attention.query_key_value", "qkv qkv qkv qkv"),
        (MPT, "transformer.blocks.1.attn.Wqkv", "qqqq kkkk vvvv"),
        (FALCON_7B, "transformer.h.1.self_attention.query_key_value", "qqqq kv"),
        (FALCON_40B, "transformer.h.1.self_attention.query_key_value", "qqkv qqkv"),
    ],
    ids=["neox", "mpt", "falcon 7b", "falcon 40b"],
)
def test_joint_projections_are_cut_as_their_family_lays_them(config, name, order, tmp_path):
    there = tensors(config)
    _, params = load_weights(save(tmp_path, config, there))
    heads = there[f"{name}.weight"].reshape(-1, K, D)
    order = order.replace(" ", "")
    assert len(order) == len(heads)
    for part in "qkv":
        want = np.concatenate([head for head, kind in zip(heads, order) if kind == part])
        np.testing.assert_array_equal(params["blocks"][part][1].T, want)
    if config is NEOX:
        heads = there[f"{name}.bias"].reshape(-1, K)
        want = np.concatenate([head for head, kind in zip(heads, order) if kind == "k"])
        np.testing.assert_array_equal(params["blocks"]["k_bias"][1], want)


def test_half_precision_loads_as_asked(tmp_path):
    there = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors(LLAMA).items()}
    folder = save(tmp_path, LLAMA, there)
    for dtype in ("float32", "bfloat16"):
        _, params = load_weights(folder, dtype=dtype)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
        got = np.asarray(params["embed"], np.float32)
        np.testing.assert_array_equal(got, there["model.embed_tokens.weight"].astype(np.float32))


def test_what_a_file_may_hold_or_lack(tmp_path):
    """A tied head is not needed; old buffers are passed over; a file saved without its head has no prefix."""
    tied = {**LLAMA, "tie_word_embeddings": True}
    there = tensors(LLAMA)
    config, params = load_weights(save(tmp_path / "a", tied, there))
    assert config.tie_embeddings and "unembed" not in params
    del there["lm_head.weight"]
    there["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    there = {name.removeprefix("model."): tensor for name, tensor in there.items()}
    _, again = load_weights(save(tmp_path / "b", tied, there))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    neox = tensors(NEOX) | {"gpt_neox.layers.0.attention.bias": np.zeros((1, 1, 4, 4), np.float32)}
    neox["lm_head.weight"] = neox.pop("embed_out.weight")  # since transformers 5
    load_weights(save(tmp_path / "c", NEOX, neox))


def test_everything_wrong_is_listed_in_one_error(tmp_path):
    there = tensors(LLAMA)
    del there["model.layers.1.self_attn.k_proj.weight"]
    there["model.layers.2.mlp.up_proj.weight"] = np.zeros((F, D), np.float32)
    there["model.layers.0.self_attn.q_proj.bias"] = np.zeros(H * K, np.float32)
    there["classifier.weight"] = np.zeros((2, D), np.float32)
    there["model.norm.weight"] = np.zeros(D + 1, np.float32)
    there["model.embed_tokens.weight"] = np.zeros((D, V), np.float32)
    with pytest.raises(ValueError, match="do not fit the llama model") as caught:
        load_weights(save(tmp_path, LLAMA, there))
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == {
        "missing: model.layers.1.self_attn.k_proj.weight",
        "unexpected: model.layers.2.mlp.up_proj.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
        "unexpected: classifier.weight",
        "misshapen: model.norm.weight is (17,), the model needs (16,)",
        f"misshapen: model.embed_tokens.weight is {(D, V)}, the model needs {(V, D)}",
    }


def test_a_long_list_is_cut():
    from sinks.convert import model_params

    config = replace(model_config(LLAMA, "x"), depth=50)
    there = {f"other.{i}": weights.Tensor((1,), lambda: np.zeros(1)) for i in range(60)}
    with pytest.raises(ValueError, match=r"\.\.\. and \d+ more"):
        model_params(there, config)


def test_configs_of_the_families():
    llama = model_config(LLAMA, "x")
    assert (llama.heads, llama.kv_heads, llama.head_dim, llama.mlp_dim) == (H, 2, K, F)
    assert (llama.rope_theta, llama.bos_id, llama.eos_ids) == (500, 1, (2, 3))
    neox = model_config(NEOX, "x")
    assert (neox.rotary_dim, neox.parallel_residual, neox.parallel_norms) == (2, True, 2)
    mpt = model_config({**MPT, "attn_config": {"clip_qkv": 6}}, "x")
    assert (mpt.alibi, mpt.rotary_dim, mpt.clip_qkv, mpt.tie_embeddings) == (True, 0, 6, True)
    seven, forty = model_config(FALCON_7B, "x"), model_config(FALCON_40B, "x")
    assert (seven.kv_heads, seven.parallel_norms, forty.kv_heads, forty.parallel_norms) == (
        1,
        1,
        2,
        2,
    )
    mistral = {**LLAMA, "model_type": "mistral", "sliding_window": 32}
    assert model_config(mistral, "x").max_positions == 32
    assert model_config({**mistral, "sliding_window": None}, "x").max_positions == 64
    assert (llama.depth, mpt.depth) == (L, L)


def test_rope_scaling_under_its_old_and_new_names():
    old = {"type": "linear", "factor": 2.0}
    assert model_config({**LLAMA, "rope_scaling": old}, "x").rope_scaling == RopeScaling(
        "linear", 2
    )
    new = {
        "rope_type": "llama3",
        "rope_theta": 7.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = model_config({**LLAMA, "rope_parameters": new}, "x")
    assert config.rope_theta == 7
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    with pytest.raises(ValueError, match=r"a/config\.json: rope scaling 'dynamic' is not"):
        model_config({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2}}, "a/config.json")


@pytest.mark.parametrize(
    "config, message",
    [
        ({**LLAMA, "model_type": "gpt2"}, r"model_type='gpt2', known are llama, mistral"),
        ({}, "model_type=None"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({**LLAMA, "hidden_act": "relu"}, "activation 'relu', known are silu"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "here: lacks hidden_size"),
        (
            {**MPT, "attn_config": {"qk_ln": True}},
            "attn_config beyond what sinks/models/mpt.py computes: qk_ln=true",
        ),
        ({**MPT, "logit_scale": 2.0}, "logit_scale"),
    ],
)
def test_configs_that_cannot_be_computed_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        model_config(config, "here")


@pytest.mark.parametrize(
    "kind", [np.bool_, np.int32, np.uint8, np.complex64, ml_dtypes.float8_e4m3fn], ids=str
)
def test_weights_that_are_no_floats_are_refused(tmp_path, kind):
    there = tensors(LLAMA)
    there["model.norm.weight"] = there["model.norm.weight"].astype(kind)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds \w+, a weight is F64, F32"):
        load_weights(save(tmp_path, LLAMA, there))


@pytest.mark.parametrize(
    "stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, stored, dtype):
    there = {name: values.astype(stored) for name, values in tensors(LLAMA).items()}
    load_weights(save(tmp_path, LLAMA, there), dtype=dtype)
    bad = "model.layers.1.mlp.up_proj.weight"
    for value in (np.nan, np.inf, -np.inf, *([1e300] if stored is np.float64 else [])):
        there[bad][3, 5] = value
        with pytest.raises(
            ValueError, match=rf"model\.safetensors: {re.escape(bad)} holds values that"
        ):
            load_weights(save(tmp_path, LLAMA, there), dtype=dtype)


def test_masks_of_another_type_are_still_passed_over(tmp_path):
    neox = tensors(NEOX) | {"gpt_neox.layers.0.attention.bias": np.ones((1, 1, 4, 4), np.bool_)}
    neox["gpt_neox.layers.0.attention.masked_bias"] = np.float32(-np.inf)[None]
    load_weights(save(tmp_path, NEOX, neox))


@pytest.mark.parametrize("key, value", [
    ("tie_word_embeddings", "yes"), ("mlp_bias", "false"), ("rope_theta", None), ("rope_theta", "1e4"), ("rope_theta", 0),
    ("rope_theta", -1.0), ("rope_theta", float("nan")), ("rope_theta", float("inf")), ("rope_theta", True),
    ("rms_norm_eps", None), ("rms_norm_eps", "1e-5"), ("rms_norm_eps", 0), ("rms_norm_eps", -1e-5),
    ("rms_norm_eps", float("nan")), ("rms_norm_eps", float("inf")), ("rope_scaling", "linear"),
    ("num_hidden_layers", 2.0), ("num_hidden_layers", [2]), ("vocab_size", 10**12), ("hidden_size", -16),
    ("eos_token_id", "2"), ("bos_token_id", 10**9),
])  # fmt: skip
def test_a_field_that_is_not_what_it_must_be_is_named(key, value):
    with pytest.raises(ValueError, match=rf"^a/config\.json: .*{key}"):
        model_config({**LLAMA, key: value}, "a/config.json")


@pytest.mark.parametrize("config, message", [
    ({**FALCON_7B, "alibi": "true"}, "alibi='true', it must be true or false"),
    ({**NEOX, "rotary_pct": None}, "rotary_pct=null, it must be a number above 0"),
    ({**MPT, "attn_config": {"alibi": "true"}}, "alibi='true', it must be true"),
    ({**LLAMA, "rope_scaling": {"type": "linear"}}, "rope_scaling: lacks factor"),
    ({**LLAMA, "rope_scaling": {"factor": 2.0}}, "lacks the rope_type"),
    ({**LLAMA, "num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
    ({**LLAMA, "hidden_size": 18}, "18 is no multiple of 4 heads"),
    ({**LLAMA, "quantization_config": "awq"}, r"quantised \(awq\)"),
])  # fmt: skip
def test_fields_that_do_not_go_together_are_named(config, message):
    with pytest.raises(ValueError, match=rf"^here: .*{message}"):
        model_config(config, "here")


def test_null_is_what_real_files_mean_by_it():
    nulls = (
        "quantization_config",
        "rope_scaling",
        "rope_parameters",
        "sliding_window",
        "head_dim",
        "bos_token_id",
    )
    nulls = {**LLAMA, **dict.fromkeys(nulls), "mlp_bias": None}
    assert model_config(nulls, "x") == replace(model_config(LLAMA, "x"), bos_id=-1)
    endless = model_config({**LLAMA, "max_position_embeddings": None}, "x")
    assert endless.max_positions == 2**31 - 1
    assert model_config({**LLAMA, "bos_token_id": -1, "eos_token_id": -1}, "x").eos_ids == ()


@pytest.mark.parametrize(
    "key, size",
    [("num_hidden_layers", 10**5), ("vocab_size", 2**31 - 1), ("intermediate_size", 2**31 - 1)],
)
def test_sizes_are_compared_with_the_file_before_memory_is_asked_for(
    tmp_path, monkeypatch, key, size
):
    folder = save(tmp_path, {**LLAMA, key: size}, tensors(LLAMA))
    monkeypatch.setattr(np, "empty", None)
    with pytest.raises(
        ValueError, match=r"100000 blocks, and there are 21 tensors|the model needs"
    ):
        load_weights(folder)


@pytest.mark.parametrize("wrong", [
    {"width": "16"}, {"depth": True}, {"norm_eps": float("nan")}, {"norm_eps": 0}, {"rope_theta": float("inf")},
    {"rope_theta": 0.5}, {"alibi": 1}, {"tie_embeddings": "yes"}, {"bos_id": 10**6}, {"eos_ids": (2, "3")}, {"eos_ids": 2},
    {"heads": 2.0},
    {"clip_qkv": float("nan")}, {"rope_fraction": 0.01}, {"parallel_norms": 3},
])  # fmt: skip
def test_a_config_of_our_own_is_checked_too(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(model_config(LLAMA, "x"), **wrong)
