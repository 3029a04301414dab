"""Hugging Face folders of small models in parts."""

import json
from copy import deepcopy
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from sinks.weights import INDEX
from tests.sinks import checkpoints
from tests.sinks.checkpoints import CHATML, CONFIGS, SPECIAL, byte_level_metadata

Files = dict[str, Any]  # by name: bytes, text, a JSON value, or tensors by name
CONFIG, GENERATION = "config.json", "generation_config.json"
WORDS, WORDS_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
JSON = (CONFIG, GENERATION, WORDS, WORDS_CONFIG, INDEX)
REAL = {  # what real files say beside the sizes
    "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
    "quantization_config": None, "rope_scaling": None, "pretraining_tp": 1, "attention_dropout": 0.0, "pad_token_id": -1,
}  # fmt: skip


def _words() -> Any:
    from sinks import tokenizer_files

    return json.loads(tokenizer_files.from_gguf(byte_level_metadata()).backend.to_str())


TOKENIZER = _words()


def good(rng: np.random.Generator) -> Files:
    """A folder that loads: a family, one file or shards, a type of weights, tied or not."""
    family = str(rng.choice(["llama", "llama", "llama", *CONFIGS]))
    config = deepcopy({**CONFIGS[family], **REAL})
    there = checkpoints.tensors(config)
    kind = [np.float32, np.float16, ml_dtypes.bfloat16][rng.integers(3)]
    there = {name: values.astype(kind) for name, values in there.items()}
    if family == "llama" and rng.random() < 0.3:
        config["tie_word_embeddings"] = True
        del there["lm_head.weight"]
    if family == "llama" and rng.random() < 0.2:
        config["max_position_embeddings"] = None
    files: Files = {
        CONFIG: config,
        WORDS: deepcopy(TOKENIZER),
        WORDS_CONFIG: {"bos_token": SPECIAL[1], "eos_token": {"content": SPECIAL[2]}, "model_max_length": 1e30},
        GENERATION: {"eos_token_id": [2, 0], "bos_token_id": 1, "do_sample": True, "temperature": 0.6},
    }  # fmt: skip
    if rng.random() < 0.5:
        files[TEMPLATE] = CHATML
    else:
        files[WORDS_CONFIG]["chat_template"] = CHATML
    if rng.random() < 0.4:
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        where = {name: names[i % 2] for i, name in enumerate(there)}
        for file in names:
            files[file] = {name: there[name] for name in there if where[name] == file}
        files[INDEX] = {"metadata": {"total_size": 1}, "weight_map": where}
    else:
        files["model.safetensors"] = there
    return files


def to_bytes(files: Files) -> dict[str, bytes]:
    out = {}
    for name, content in files.items():
        if isinstance(content, bytes | str):
            out[name] = (
                content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
            )
        elif name.endswith(".safetensors"):
            out[name] = save(content)
        else:
            out[name] = json.dumps(content).encode()
    return out


# By model_type, what config.json must not say.
NEVER: dict[str, list[tuple[str, Any]]] = {
    "llama": [
        ("tie_word_embeddings", "yes"), ("mlp_bias", "true"), ("attention_bias", 1), ("rope_theta", None),
        ("rope_theta", "10000"), ("rope_theta", 0), ("rope_theta", -1.0), ("rope_theta", float("nan")),
        ("rope_theta", float("inf")), ("rms_norm_eps", None), ("rms_norm_eps", "1e-5"), ("rms_norm_eps", 0),
        ("rms_norm_eps", -1e-5), ("rms_norm_eps", float("nan")), ("rms_norm_eps", float("inf")),
        ("rope_scaling", "linear"), ("rope_scaling", {"factor": 2.0}), ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "linear", "factor": "2"}), ("rope_scaling", {"type": "linear", "factor": None}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}), ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}), ("hidden_size", "16"), ("hidden_size", 16.0),
        ("num_hidden_layers", 10**5), ("num_hidden_layers", True), ("vocab_size", 10**12), ("vocab_size", 2**31 - 1),
        ("intermediate_size", 2**31 - 1), ("num_attention_heads", 0), ("num_attention_heads", 3),
        ("num_key_value_heads", 3), ("num_key_value_heads", [2, 2]), ("head_dim", 3), ("hidden_act", "relu"),
        ("hidden_act", None), ("bos_token_id", 10**9), ("eos_token_id", "2"), ("eos_token_id", [2, 10**9]),
        ("quantization_config", {"quant_method": "gptq"}), ("quantization_config", "awq"), ("model_type", None),
        ("model_type", ["llama"]), ("model_type", "gpt2"), ("max_position_embeddings", 0),
        ("max_position_embeddings", "64"), ("sliding_window", -1),
    ],
    "gpt_neox": [
        ("rotary_pct", None), ("rotary_pct", 0), ("rotary_pct", 2), ("rotary_pct", 1e-9), ("layer_norm_eps", None),
        ("use_parallel_residual", "no"), ("rotary_emb_base", 0),
    ],
    "mpt": [
        ("attn_config", {"alibi": "true"}), ("attn_config", {"alibi": False}), ("attn_config", []), ("no_bias", "x"),
        ("attn_config", {"clip_qkv": float("nan")}), ("expansion_ratio", 0), ("expansion_ratio", 4.01),
        ("expansion_ratio", "4"), ("logit_scale", 0.5), ("layer_norm_epsilon", 0),
    ],
    "falcon": [
        ("alibi", "true"), ("multi_query", "no"), ("bias", "x"), ("new_decoder_architecture", "true"),
        ("parallel_attn", 0), ("ffn_hidden_size", -1), ("layer_norm_epsilon", None),
    ],
}  # fmt: skip
