"""Hugging Face's config.json into our ModelConfig, family by family."""

from collections.abc import Callable, Mapping
from typing import Any

from sinks.config import ModelConfig, RopeScaling
from sinks.fields import (
    FLAG,
    LARGEST,
    OBJECT,
    TEXT,
    Field,
    Kind,
    count,
    either,
    list_of,
    number,
    one_of,
    read,
)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


# What config.json may say, family by family. Names are the file's. Where transformers takes null for false, so do we.
_SIZE = Field(count())
_OR_ABSENT = Field(count(), default=None, null=None)
_OFF = Field(FLAG, default=False, null=False)
_ON = Field(FLAG, default=True, null=False)
_ONLY_NULL = Field(Kind("null", lambda v: False), default=None, null=None)
_EPS = number(0, 1)
_THETA = number(1, 1e15)
_TOKEN = count(-1)  # -1: there is none
_POSITIONS = Field(count(), null=LARGEST)  # null: it was made for no particular length
_SHARED = {
    "vocab_size": _SIZE,
    "bos_token_id": Field(_TOKEN, default=None, null=None),
    "eos_token_id": Field(either(_TOKEN, list_of(count(0), "token ids")), default=None, null=None),
}
_SIZES = {"hidden_size": _SIZE, "num_hidden_layers": _SIZE, "num_attention_heads": _SIZE}
_ROPE = {
    "rope_scaling": Field(OBJECT, default=None, null=None),
    "rope_parameters": Field(OBJECT, default=None, null=None),
    "rope_theta": Field(_THETA, default=None),
    "rotary_emb_base": Field(_THETA, default=10_000.0),
    "rotary_pct": Field(number(0, 1), default=None),
}
_ROPE_OBJECT = {
    "rope_type": Field(TEXT, default=None),
    "type": Field(TEXT, default=None),
    "rope_theta": Field(_THETA, default=None),
    "partial_rotary_factor": Field(number(0, 1), default=None),
}
_FACTOR = {"factor": Field(number(1, 1e6, or_equal=True))}
_SCALINGS = {
    "linear": _FACTOR,
    "llama3": {
        **_FACTOR,
        "low_freq_factor": Field(number(0, 1e6)),
        "high_freq_factor": Field(number(0, 1e6)),
        "original_max_position_embeddings": _SIZE,
    },
}
_LLAMA = {
    **_SHARED,
    **_SIZES,
    **_ROPE,
    "num_key_value_heads": _OR_ABSENT,
    "head_dim": _OR_ABSENT,
    "intermediate_size": _SIZE,
    "max_position_embeddings": _POSITIONS,
    "rms_norm_eps": Field(_EPS, default=1e-6),
    "hidden_act": Field(TEXT, default="silu"),
    "attention_bias": Field(FLAG, default=None, null=False),
    "mlp_bias": _OFF,
    "tie_word_embeddings": _OFF,
    "sliding_window": _OR_ABSENT,
    "use_sliding_window": Field(FLAG, default=None, null=False),
}
_NEOX = {
    **_SHARED,
    **_SIZES,
    **_ROPE,
    "intermediate_size": _SIZE,
    "max_position_embeddings": _POSITIONS,
    "layer_norm_eps": Field(_EPS, default=1e-5),
    "hidden_act": Field(TEXT, default="gelu"),
    "attention_bias": _ON,
    "use_parallel_residual": _ON,
    "tie_word_embeddings": _OFF,
}
_MPT = {
    **_SHARED,
    "d_model": _SIZE,
    "n_heads": _SIZE,
    "n_layers": _SIZE,
    "max_seq_len": _POSITIONS,
    "expansion_ratio": Field(number(0, 1000), default=4),
    "layer_norm_epsilon": Field(_EPS, default=1e-5),
    "no_bias": _ON,
    "attn_config": Field(OBJECT, default=None, null=None),
    "logit_scale": _ONLY_NULL,
    "tie_word_embeddings": _ON,
}
_MPT_ATTENTION = {
    "attn_type": Field(one_of("multihead_attention"), default=None),
    "qk_ln": Field(one_of(False), default=None),
    "prefix_lm": Field(one_of(False), default=None, null=None),
    "softmax_scale": _ONLY_NULL,
    "alibi": Field(one_of(True), default=None),
    "alibi_bias_max": Field(one_of(8, 8.0), default=None),
    "clip_qkv": Field(number(0, 1e6, or_equal=True), default=0.0, null=0.0),
}
_FALCON = {
    **_SHARED,
    **_SIZES,
    **_ROPE,
    "new_decoder_architecture": _OFF,
    "multi_query": _ON,
    "num_kv_heads": _OR_ABSENT,
    "alibi": _OFF,
    "bias": _OFF,
    "ffn_hidden_size": _OR_ABSENT,
    "max_position_embeddings": Field(count(), default=2048, null=LARGEST),
    "layer_norm_epsilon": Field(_EPS, default=1e-5),
    "activation": Field(TEXT, default="gelu"),
    "parallel_attn": _ON,
    "num_ln_in_parallel_attn": Field(one_of(1, 2), default=None, null=None),
    "tie_word_embeddings": _ON,
}


def model_config(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """Our sizes and options from a checkpoint's config.json; `where` names the file in errors.

    Raises ValueError for other families, fields that are missing or not what they must be, and options that our models
    do not compute.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ValueError(f"{where}: model_type={kind!r}, known are {', '.join(_FAMILIES)}")
    if (quantised := hf.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"{where}: the weights are quantised ({method}); take the unquantised checkpoint"
        )
    table, convert = _FAMILIES[kind]
    settings = {"model_type": kind, **read(hf, table, where)}
    try:
        return convert(settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _llama(hf: Mapping[str, Any]) -> ModelConfig:
    kind, width, heads = hf["model_type"], hf["hidden_size"], hf["num_attention_heads"]
    biased = kind == "qwen2" if hf["attention_bias"] is None else hf["attention_bias"]
    slides = hf["use_sliding_window"]
    window = hf["sliding_window"] if (kind == "mistral" if slides is None else slides) else None
    return ModelConfig(
        family="llama",
        vocab_size=hf["vocab_size"],
        width=width,
        depth=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=_shared_by(hf, "num_key_value_heads"),
        head_dim=hf["head_dim"] or _per_head(width, heads),
        mlp_dim=hf["intermediate_size"],
        max_positions=min(hf["max_position_embeddings"], window or LARGEST),
        norm_eps=hf["rms_norm_eps"],
        activation=_activation(hf["hidden_act"]),
        attention_bias=biased,
        out_bias=biased and kind != "qwen2",
        mlp_bias=hf["mlp_bias"],
        tie_embeddings=hf["tie_word_embeddings"],
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
        head_dim=_per_head(width, heads),
        mlp_dim=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        norm_eps=hf["layer_norm_eps"],
        activation=_activation(hf["hidden_act"]),
        attention_bias=hf["attention_bias"],
        mlp_bias=True,
        parallel_residual=hf["use_parallel_residual"],
        tie_embeddings=hf["tie_word_embeddings"],
        **_rope(hf, fraction=0.25),
        **_special(hf),
    )


def _mpt(hf: Mapping[str, Any]) -> ModelConfig:
    where = "attn_config beyond what sinks/models/mpt.py computes"
    attention = read(hf["attn_config"] or {}, _MPT_ATTENTION, where)
    width, heads, biased = hf["d_model"], hf["n_heads"], not hf["no_bias"]
    hidden = width * hf["expansion_ratio"]
    if hidden != int(hidden):
        raise ValueError(
            f"expansion_ratio={hf['expansion_ratio']} times d_model={width} is no whole number"
        )
    return ModelConfig(
        family="mpt",
        vocab_size=hf["vocab_size"],
        width=width,
        depth=hf["n_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=_per_head(width, heads),
        mlp_dim=int(hidden),
        max_positions=hf["max_seq_len"],
        norm_eps=hf["layer_norm_epsilon"],
        rope_theta=0,
        alibi=True,
        activation="gelu",
        attention_bias=biased,
        mlp_bias=biased,
        norm_bias=biased,
        clip_qkv=attention["clip_qkv"],
        tie_embeddings=hf["tie_word_embeddings"],
        **_special(hf),
    )


def _falcon(hf: Mapping[str, Any]) -> ModelConfig:
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    grouped, alibi, biased = hf["new_decoder_architecture"], hf["alibi"], hf["bias"]
    many = grouped or not hf["multi_query"]
    return ModelConfig(
        family="falcon",
        vocab_size=hf["vocab_size"],
        width=width,
        depth=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=_shared_by(hf, "num_kv_heads") if many else 1,
        head_dim=_per_head(width, heads),
        mlp_dim=hf["ffn_hidden_size"] or 4 * width,
        max_positions=hf["max_position_embeddings"],
        norm_eps=hf["layer_norm_epsilon"],
        alibi=alibi,
        activation=_activation(hf["activation"]),
        attention_bias=biased,
        mlp_bias=biased,
        parallel_residual=grouped or hf["parallel_attn"],
        parallel_norms=(hf["num_ln_in_parallel_attn"] or 2) if grouped else 1,
        tie_embeddings=hf["tie_word_embeddings"],
        **({"rope_theta": 0} if alibi else _rope(hf)),
        **_special(hf),
    )


_FAMILIES: dict[str, tuple[dict[str, Field], Callable[[Mapping[str, Any]], ModelConfig]]] = {
    "llama": (_LLAMA, _llama),
    "mistral": (_LLAMA, _llama),
    "qwen2": (_LLAMA, _llama),
    "gpt_neox": (_NEOX, _neox),
    "mpt": (_MPT, _mpt),
    "falcon": (_FALCON, _falcon),
}


def _per_head(width: int, heads: int) -> int:
    if width % heads:
        raise ValueError(f"a width of {width} is no multiple of {heads} heads")
    return width // heads


def _shared_by(hf: Mapping[str, Any], name: str) -> int:
    """Key heads, each shared by as many query heads."""
    heads = hf["num_attention_heads"]
    keys = hf[name] or heads
    if heads % keys:
        raise ValueError(f"num_attention_heads={heads} is no multiple of {name}={keys}")
    return keys


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r}, known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _rope(hf: Mapping[str, Any], fraction: float = 1.0) -> dict[str, Any]:
    """RoPE's settings, as transformers 5 writes them (rope_parameters) and as earlier ones did."""
    old, new = hf["rope_scaling"] or {}, hf["rope_parameters"] or {}
    where = "rope_parameters" if new else "rope_scaling"
    both = {**old, **new}
    rope = read(both, _ROPE_OBJECT, where)
    if layered := [key for key, value in both.items() if isinstance(value, dict)]:
        raise ValueError(f"{where} differs from layer to layer ({', '.join(layered)})")
    kind, scaling = rope["rope_type"] or rope["type"] or "default", None
    if "factor" in both and not {"rope_type", "type"} & both.keys():
        raise ValueError(f"{where} has a factor, and lacks the rope_type that says of what")
    if kind != "default":
        s = read(both, _SCALINGS.get(kind, {}), where)
        scaling = RopeScaling(
            kind,
            s.get("factor", 1.0),
            s.get("low_freq_factor", 1.0),
            s.get("high_freq_factor", 4.0),
            s.get("original_max_position_embeddings", 8192),
        )
    return {
        "rope_theta": rope["rope_theta"] or hf["rope_theta"] or hf["rotary_emb_base"],
        "rope_fraction": rope["partial_rotary_factor"] or hf["rotary_pct"] or fraction,
        "rope_scaling": scaling,
    }


def _special(hf: Mapping[str, Any]) -> dict[str, Any]:
    bos, eos = hf["bos_token_id"], hf["eos_token_id"]
    eos = [] if eos is None or eos == -1 else eos if isinstance(eos, list) else [eos]
    for token in (*eos, *([] if bos is None else [bos])):
        if token >= hf["vocab_size"]:
            raise ValueError(
                f"bos_token_id={bos} and eos_token_id={hf['eos_token_id']} must be below "
                f"vocab_size={hf['vocab_size']}: set what the model does not use to null"
            )
    return {"bos_id": -1 if bos is None else bos, "eos_ids": tuple(eos)}
