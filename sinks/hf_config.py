"""Hugging Face's config.json into our ModelConfig, family by family."""

from collections.abc import Mapping
from typing import Any

from sinks.config import ModelConfig, RopeScaling

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def model_config(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """Our sizes and options from a checkpoint's config.json; `where` names the file in errors.

    Raises ValueError for other families, missing keys, and options that our models do not compute.
    """
    kind = hf.get("model_type")
    if kind not in _CONFIGS:
        raise ValueError(f"{where}: model_type={kind!r}, known are {', '.join(_CONFIGS)}")
    if "quantization_config" in hf:
        method = hf["quantization_config"].get("quant_method")
        raise ValueError(
            f"{where}: the weights are quantised ({method}); take the unquantised checkpoint"
        )
    try:
        return _CONFIGS[kind](hf)
    except KeyError as error:
        raise ValueError(f"{where} lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _llama(hf: Mapping[str, Any]) -> ModelConfig:
    kind, width, heads = hf["model_type"], hf["hidden_size"], hf["num_attention_heads"]
    biased = hf.get("attention_bias", kind == "qwen2")
    window = hf.get("sliding_window") if hf.get("use_sliding_window", kind == "mistral") else None
    return ModelConfig(
        family="llama",
        vocab_size=hf["vocab_size"],
        width=width,
        depth=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or width // heads,
        mlp_dim=hf["intermediate_size"],
        max_positions=min(hf["max_position_embeddings"], window or 2**31),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=_activation(hf.get("hidden_act", "silu")),
        attention_bias=biased,
        out_bias=biased and kind != "qwen2",
        mlp_bias=hf.get("mlp_bias", False),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        **_rope(hf),
        **_special(hf),
    )


def _neox(hf: Mapping[str, Any]) -> ModelConfig:
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    return ModelConfig(
        family="neox",
        vocab_size=hf["vocab_size"],
        width=width,
        depth=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_dim=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        activation=_activation(hf.get("hidden_act", "gelu")),
        attention_bias=hf.get("attention_bias", True),
        mlp_bias=True,
        parallel_residual=hf.get("use_parallel_residual", True),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        **_rope(hf, fraction=0.25),
        **_special(hf),
    )


def _mpt(hf: Mapping[str, Any]) -> ModelConfig:
    attention = hf.get("attn_config") or {}
    usual = {
        "attn_type": "multihead_attention",
        "qk_ln": False,
        "prefix_lm": False,
        "softmax_scale": None,
        "alibi": True,
        "alibi_bias_max": 8,
    }
    odd = {k: attention[k] for k, v in usual.items() if attention.get(k, v) != v}
    odd |= {k: v for k, v in hf.items() if k == "logit_scale" and v is not None}
    if odd:
        raise ValueError(f"options that sinks/models/mpt.py does not compute: {odd}")
    width, heads, biased = hf["d_model"], hf["n_heads"], not hf.get("no_bias", True)
    return ModelConfig(
        family="mpt",
        vocab_size=hf["vocab_size"],
        width=width,
        depth=hf["n_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_dim=width * hf.get("expansion_ratio", 4),
        max_positions=hf["max_seq_len"],
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        rope_theta=0,
        alibi=True,
        activation="gelu",
        attention_bias=biased,
        mlp_bias=biased,
        norm_bias=biased,
        clip_qkv=attention.get("clip_qkv") or 0.0,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        **_special(hf),
    )


def _falcon(hf: Mapping[str, Any]) -> ModelConfig:
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    grouped, alibi = hf.get("new_decoder_architecture", False), hf.get("alibi", False)
    if grouped or not hf.get("multi_query", True):
        kv_heads = hf.get("num_kv_heads") or heads
    else:
        kv_heads = 1
    biased = hf.get("bias", False)
    return ModelConfig(
        family="falcon",
        vocab_size=hf["vocab_size"],
        width=width,
        depth=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_dim=hf.get("ffn_hidden_size") or 4 * width,
        max_positions=hf.get("max_position_embeddings", 2048),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        alibi=alibi,
        activation=_activation(hf.get("activation", "gelu")),
        attention_bias=biased,
        mlp_bias=biased,
        parallel_residual=grouped or hf.get("parallel_attn", True),
        parallel_norms=(hf.get("num_ln_in_parallel_attn") or 2) if grouped else 1,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        **({"rope_theta": 0} if alibi else _rope(hf)),
        **_special(hf),
    )


_CONFIGS = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "gpt_neox": _neox,
    "mpt": _mpt,
    "falcon": _falcon,
}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r}, known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _rope(hf: Mapping[str, Any], fraction: float = 1.0) -> dict[str, Any]:
    """RoPE's settings, as transformers 5 writes them (rope_parameters) and as earlier ones did."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = hf.get("rope_theta", hf.get("rotary_emb_base", 10_000.0))
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind != "default":
        scaling = RopeScaling(
            kind,
            rope.get("factor", 1.0),
            rope.get("low_freq_factor", 1.0),
            rope.get("high_freq_factor", 4.0),
            rope.get("original_max_position_embeddings", 8192),
        )
    return {
        "rope_theta": rope.get("rope_theta", theta),
        "rope_fraction": rope.get("partial_rotary_factor", hf.get("rotary_pct", fraction)),
        "rope_scaling": scaling,
    }


def _special(hf: Mapping[str, Any]) -> dict[str, Any]:
    bos, eos = hf.get("bos_token_id"), hf.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    return {"bos_id": -1 if bos is None else bos, "eos_ids": tuple(eos)}
