"""Checkpoint folders as transformers saves them, with random weights, and a small tokenizer's GGUF metadata."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from sinks import tokenizer_files
from sinks.weights import INDEX

D, H, K, F, V, L = 16, 4, 4, 24, 264, 2
COMMON = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H}
LLAMA = {
    "model_type": "llama",
    **COMMON,
    "num_key_value_heads": 2,
    "intermediate_size": F,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
NEOX = {
    "model_type": "gpt_neox",
    **COMMON,
    "intermediate_size": F,
    "max_position_embeddings": 64,
    "rotary_pct": 0.5,
}
MPT = {
    "model_type": "mpt",
    "vocab_size": V,
    "d_model": D,
    "n_heads": H,
    "n_layers": L,
    "max_seq_len": 64,
}
FALCON_7B = {"model_type": "falcon", **COMMON}
FALCON_40B = {**FALCON_7B, "new_decoder_architecture": True, "num_kv_heads": 2}
CONFIGS = {
    "llama": LLAMA,
    "neox": NEOX,
    "mpt": MPT,
    "falcon 7b": FALCON_7B,
    "falcon 40b": FALCON_40B,
}


def shapes(config):
    """Hugging Face's names and shapes of each family's tensors."""
    if config["model_type"] == "llama":
        top = {
            "model.embed_tokens.weight": (V, D),
            "model.norm.weight": (D,),
            "lm_head.weight": (V, D),
        }
        G, prefix = config["num_key_value_heads"], "model.layers."
        block = {
            "input_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (H * K, D),
            "self_attn.k_proj.weight": (G * K, D),
            "self_attn.v_proj.weight": (G * K, D),
            "self_attn.o_proj.weight": (D, H * K),
            "post_attention_layernorm.weight": (D,),
            "mlp.gate_proj.weight": (F, D),
            "mlp.up_proj.weight": (F, D),
            "mlp.down_proj.weight": (D, F),
        }
    elif config["model_type"] == "gpt_neox":
        prefix = "gpt_neox.layers."
        top = {"gpt_neox.embed_in.weight": (V, D), "embed_out.weight": (V, D)}
        top |= {f"gpt_neox.final_layer_norm.{kind}": (D,) for kind in ("weight", "bias")}
        block = {
            "attention.query_key_value.weight": (3 * D, D),
            "attention.query_key_value.bias": (3 * D,),
            "attention.dense.weight": (D, D),
            "attention.dense.bias": (D,),
            "mlp.dense_h_to_4h.weight": (F, D),
            "mlp.dense_h_to_4h.bias": (F,),
            "mlp.dense_4h_to_h.weight": (D, F),
            "mlp.dense_4h_to_h.bias": (D,),
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            block |= {f"{norm}.{kind}": (D,) for kind in ("weight", "bias")}
    elif config["model_type"] == "mpt":
        top = {"transformer.wte.weight": (V, D), "transformer.norm_f.weight": (D,)}
        prefix = "transformer.blocks."
        block = {
            "norm_1.weight": (D,),
            "attn.Wqkv.weight": (3 * D, D),
            "attn.out_proj.weight": (D, D),
            "norm_2.weight": (D,),
            "ffn.up_proj.weight": (4 * D, D),
            "ffn.down_proj.weight": (D, 4 * D),
        }
    else:
        top = {"transformer.word_embeddings.weight": (V, D)}
        top |= {f"transformer.ln_f.{kind}": (D,) for kind in ("weight", "bias")}
        G, prefix = config.get("num_kv_heads", 1), "transformer.h."
        block = {
            "self_attention.query_key_value.weight": ((H + 2 * G) * K, D),
            "self_attention.dense.weight": (D, D),
            "mlp.dense_h_to_4h.weight": (4 * D, D),
            "mlp.dense_4h_to_h.weight": (D, 4 * D),
        }
        for norm in ("ln_attn", "ln_mlp") if "num_kv_heads" in config else ("input_layernorm",):
            block |= {f"{norm}.{kind}": (D,) for kind in ("weight", "bias")}
    blocks = {f"{prefix}{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    return top | blocks


def tensors(config, seed=0):
    rng = np.random.default_rng(seed)
    drawn = {name: rng.standard_normal(shape) for name, shape in shapes(config).items()}
    return {name: tensor.astype(np.float32) for name, tensor in drawn.items()}


def save(folder, config, tensors, files=1):
    """Writes config.json and the tensors, in one file or several with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    where = {tensor: names[i % files] for i, tensor in enumerate(tensors)}
    for file in names:
        save_file({k: v for k, v in tensors.items() if where[k] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_metadata(**changes):
    """A vocabulary of the 256 bytes, four merges, and three special tokens in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "Ġ t", "Ġt he", "Ã ©"]
    tokens = [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in merges)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def save_tokenizer(folder):
    """The byte-level vocabulary as tokenizer.json, with its two special tokens and chat template."""
    backend = tokenizer_files.from_gguf(byte_level_metadata()).backend
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def byte_level_folder(folder):
    """A small Llama with random weights that reads and writes any text: what `sinks.load(folder)` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(save(folder, LLAMA, tensors(LLAMA)))
    return folder
