"""What a model is: sizes, positions and options of the four families, as read from a checkpoint's own config."""

from dataclasses import dataclass

from sinks.fields import FLAG, LARGEST, Kind, count, number, one_of

FAMILIES = ("llama", "neox", "mpt", "falcon")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
SINK_LOGITS = ("none", "zero", "learned")

_SIZE, _POSITIVE, _THETA = count(), number(0, LARGEST), number(1, 1e15)
_KINDS: dict[str, Kind] = {
    "family": one_of(*FAMILIES),
    "activation": one_of(*ACTIVATIONS),
    "sink_logits": one_of(*SINK_LOGITS),
    **dict.fromkeys(("vocab_size", "width", "depth", "heads", "kv_heads", "head_dim"), _SIZE),
    **dict.fromkeys(("mlp_dim", "max_positions"), _SIZE),
    **dict.fromkeys(("alibi", "attention_bias", "mlp_bias", "norm_bias"), FLAG),
    **dict.fromkeys(("parallel_residual", "tie_embeddings"), FLAG),
    "out_bias": one_of(True, False, None),
    "parallel_norms": one_of(1, 2),
    "norm_eps": number(0, 1),
    "rope_theta": number(0, 1e15, or_equal=True),
    "rope_fraction": number(0, 1),
    "clip_qkv": number(0, 1e6, or_equal=True),
    "eos_ids": Kind("a tuple of token ids", lambda v: isinstance(v, tuple)),
}


@dataclass(frozen=True)
class RopeScaling:
    """A static change of RoPE's frequencies (the Hugging Face names).

    Attributes:
      kind: "linear" (all frequencies divided by factor) or "llama3" (only the slow ones, with a smooth passage).
      low_freq_factor, high_freq_factor, original_positions: of "llama3".

    Frequencies that depend on the current length (dynamic NTK, LongRoPE) have no exact streaming form
    (docs/papers/streamingllm.md 2).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(
                f"rope scaling {self.kind!r} is not supported: only 'linear' and 'llama3' are, whose frequencies do not "
                "depend on the current length"
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_positions"):
            if not _POSITIVE.holds(value := getattr(self, name)):
                raise ValueError(f"rope scaling's {name}={value!r}: must be {_POSITIVE.says}")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope scaling's low_freq_factor={self.low_freq_factor} must be below its "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of one of FAMILIES.

    Attributes:
      family: which file of sinks/models computes it.
      width, depth, heads, kv_heads, head_dim, mlp_dim: D, L, H, G, K, F of the shape legends; G divides H.
      norm_eps: of RMSNorm (llama) or LayerNorm (the others).
      max_positions: the length it was trained for.
      rope_theta: RoPE's base; 0 for models without RoPE.
      rope_fraction: part of head_dim that is rotated, from its front, as two halves (Pythia: 0.25).
      alibi: a linear bias on distances in place of RoPE (MPT, Falcon-RW).
      activation: of the MLP; gated for llama only.
      attention_bias, mlp_bias, norm_bias: whether those layers have biases (norm_bias: LayerNorm only).
      out_bias: bias of the attention's output product; None follows attention_bias (Qwen2 has q, k, v biases only).
      parallel_residual: attention and MLP read the same input (NeoX, Falcon).
      parallel_norms: norms before a parallel block: 2, or 1 shared by both (Falcon-7B).
      tie_embeddings: logits are products with the embedding.
      clip_qkv: MPT's bound on queries, keys and values; 0 for none.
      sink_logits: a term in the softmax's denominator that belongs to no key: "none"; "zero", a logit of 0 (SoftMax1,
        the paper's Zero Sink); "learned", one logit per head.
      bos_id, eos_ids: special tokens; bos_id -1 for none.
    """

    family: str
    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    alibi: bool = False
    activation: str = "silu"
    attention_bias: bool = False
    out_bias: bool | None = None
    mlp_bias: bool = False
    norm_bias: bool = True
    parallel_residual: bool = False
    parallel_norms: int = 2
    tie_embeddings: bool = False
    clip_qkv: float = 0.0
    sink_logits: str = "none"
    bos_id: int = -1
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name, kind in _KINDS.items():
            if not kind.holds(value := getattr(self, name)):
                raise ValueError(f"{name}={value!r}: must be {kind.says}")
        if self.rope_theta and not _THETA.holds(self.rope_theta):
            raise ValueError(f"rope_theta={self.rope_theta}: must be {_THETA.says}, or 0")
        tokens = (self.bos_id, *self.eos_ids)
        if wrong := [i for i in tokens if not count(-1, self.vocab_size - 1).holds(i)]:
            raise ValueError(
                f"bos_id={self.bos_id}, eos_ids={self.eos_ids}: {wrong[0]!r} is no token of "
                f"vocab_size={self.vocab_size}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.rotary_dim % 2 or (self.rope_theta and not self.rotary_dim):
            raise ValueError(
                f"rope_fraction={self.rope_fraction} of head_dim={self.head_dim} must be an even number of features, "
                "at least 2"
            )
        if self.alibi and self.rope_theta:
            raise ValueError("alibi takes the place of RoPE: set rope_theta=0")

    @property
    def rotary_dim(self) -> int:
        """How many of a head's features are rotated."""
        return int(self.head_dim * self.rope_fraction) if self.rope_theta else 0

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads
