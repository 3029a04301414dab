"""Hugging Face's live models with random weights: saved by transformers, loaded by us, the same logits.

SmolLM2's real weights are compared with what transformers' own GGUF reader makes of the same file.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")

from sinks import hub, loading, stream
from sinks.cache import CacheSpec

pytestmark = pytest.mark.peers

SIZES = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 80, "max_position_embeddings": 128}
MPT = {"vocab_size": 97, "d_model": 48, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "llama": ("Llama", {**LLAMA, "num_key_value_heads": 2}),
    "llama tied, biased, wide heads": (
        "Llama",
        {
            **LLAMA,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 16,
        },
    ),
    "llama 3's frequencies": ("Llama", {**LLAMA, "rope_parameters": LLAMA3_ROPE}),
    "linear scaling": (
        "Llama",
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("Mistral", {**LLAMA, "num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {**LLAMA, "num_key_value_heads": 1}),
    "pythia": ("GPTNeoX", {**LLAMA, "rotary_pct": 0.5, "intermediate_size": 192}),
    "neox, sequential, tied": (
        "GPTNeoX",
        {
            **LLAMA,
            "rotary_pct": 0.5,
            "use_parallel_residual": False,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
        },
    ),
    "mpt": ("Mpt", MPT),
    "mpt, 6 heads, bounded": ("Mpt", {**MPT, "n_heads": 6, "attn_config": {"clip_qkv": 0.5}}),
    "falcon 7b": ("Falcon", SIZES),
    "falcon 40b": (
        "Falcon",
        {
            **SIZES,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "tie_word_embeddings": False,
        },
    ),
    "falcon 11b": (
        "Falcon",
        {
            **SIZES,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 100,
        },
    ),
    "falcon-rw": (
        "Falcon",
        {**SIZES, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    ),
}


def peer(kind, settings, seed=0):
    """A model with weights large enough for attention to be peaked, and no vector at its trivial value."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**settings)
    # Falcon's eager path adds ALiBi twice (transformers 5.23), its other one once
    path = "sdpa" if kind == "Falcon" else "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(
        config, attn_implementation=path, dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.copy_(
                    0.1 * noise + ("norm" in name or "ln_" in name) * ("bias" not in name)
                )
            elif not any(part in name for part in ("embed", "wte")):
                parameter.copy_(noise * (2 / parameter.shape[1]) ** 0.5)
            else:
                parameter.copy_(noise)
    return model.eval()


def our_logits(config, params, tokens):
    spec = CacheSpec(sinks=0, recent=tokens.shape[1])

    @jax.jit
    def run(params, tokens):
        return stream.unembed(
            config, params, stream.hidden_from_start(config, params, spec, tokens)
        )

    return np.asarray(run(params, tokens))


@pytest.mark.parametrize("case", CASES)
def test_logits_agree(case, tmp_path):
    model = peer(*CASES[case])
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1  # several files and their index
    config, params = loading.load_weights(tmp_path)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 90))
    with torch.no_grad():
        want = model(torch.from_numpy(tokens)).logits.numpy()
    got = our_logits(config, params, jnp.asarray(tokens))
    assert np.abs(want).max() > 1
    assert np.abs(got - want).max() < 1e-4 * max(1, np.abs(want).max() / 10)


@pytest.fixture(scope="module")
def smollm2_path():
    try:
        return hub.fetch("smollm2-135m")
    except OSError as error:
        pytest.skip(str(error))


TEXT = "It's 1234 o'clock — naïve 日本語 😀👩‍👩‍👧\n\n  tabs\tand   spaces<|im_end|>\r\n don't DON'T x_y=3.14"


def test_smollm2s_logits_agree_with_transformers_own_gguf_reader(smollm2_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()
    config, params, tokenizer = loading.load("smollm2-135m")
    tokens = np.asarray([tokenizer.encode(loading.PARAGRAPH)])
    with torch.no_grad():
        want = model(torch.from_numpy(tokens)).logits.numpy()
    got = our_logits(config, params, jnp.asarray(tokens))
    assert np.abs(want).max() > 20
    assert np.abs(got - want).max() < 1e-3
    assert (got.argmax(-1) == want.argmax(-1)).mean() > 0.99


def test_smollm2s_tokenizer_agrees_with_transformers(smollm2_path):
    theirs = transformers.AutoTokenizer.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name
    )
    _, _, ours = loading.load("smollm2-135m", check=False)
    for text in (TEXT, loading.PARAGRAPH, "", " ", "\n"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == text
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    ]
    want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat(messages) == want
