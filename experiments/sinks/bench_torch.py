"""The peers of sinks.bench_gpu in PyTorch: decoding with a full cache of static shape, and the official re-rotation.

A Llama in the form of gpt-fast: fused qkv and gate-up products, SDPA over static keys and values, greedy sampling on the
device, and CUDA graphs by torch.compile. With a full cache nothing is masked, which is SDPA's fastest case.
"""

from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]  # extra: peers
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]  # extra: peers
from torch import nn  # pyright: ignore[reportMissingImports]  # extra: peers

from sinks.config import ModelConfig


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x [..., K] by tables [..., K / 2], in float32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Llama(nn.Module):
    """A token for each row in, the next token out; its cache is full from the start.

    Args:
      rotate_all: the released algorithm: keys are kept as they came, moved up by one for each new token, and all rotated by
        their places in the cache. Otherwise a ring, whose keys are rotated once.
    """

    def __init__(self, config: ModelConfig, sinks: int, recent: int, rows: int, rotate_all: bool):
        super().__init__()
        self.config, self.sinks, self.recent, self.rotate_all = config, sinks, recent, rotate_all
        D, G, K = config.width, config.kv_heads, config.head_dim
        self.sizes = [config.heads * K, G * K, G * K]
        shapes = [
            (sum(self.sizes), D),
            (D, config.heads * K),
            (2 * config.mlp_dim, D),
            (D, config.mlp_dim),
        ]
        matrix = lambda *shape: nn.Parameter(0.02 * torch.randn(shape))  # noqa: E731
        self.embed, self.norm = matrix(config.vocab_size, D), nn.Parameter(torch.ones(D))
        self.head = self.embed if config.tie_embeddings else matrix(config.vocab_size, D)
        self.norms = nn.ParameterList([torch.ones(2, D) for _ in range(config.depth)])
        self.blocks = nn.ParameterList([matrix(*s) for _ in range(config.depth) for s in shapes])
        held = (2, config.depth, rows, G, sinks + recent, K)
        self.register_buffer("cache", torch.randn(held))
        self.kv = [(self.cache[0, i], self.cache[1, i]) for i in range(config.depth)]
        self.frequencies = config.rope_theta ** -(torch.arange(0, K, 2) / K)

    def ready(self, device: torch.device, dtype: torch.dtype) -> "Llama":
        self.to(device, dtype).requires_grad_(False)
        self.kv = [(self.cache[0, i], self.cache[1, i]) for i in range(self.config.depth)]
        angles = torch.arange(self.sinks + self.recent)[:, None] * self.frequencies
        self.tables = angles.cos().to(device), angles.sin().to(device)
        self.frequencies = self.frequencies.to(device)
        return self

    def forward(self, token_B: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """token_B int64 [B]; place int64 [1], how many tokens came before."""
        D, K = (self.config.width,), self.config.head_dim
        x = F.embedding(token_B, self.embed)
        angles = place.float() * self.frequencies
        now = (
            (self.tables[0][-1], self.tables[1][-1])
            if self.rotate_all
            else (angles.cos(), angles.sin())
        )
        slot = self.sinks + (place - self.sinks) % self.recent
        for i, norms in enumerate(self.norms):
            qkv, out, gate_up, down = self.blocks[4 * i : 4 * i + 4]
            parts = F.linear(F.rms_norm(x, D, norms[0]), qkv).split(self.sizes, -1)
            q, k, v = (part.unflatten(-1, (-1, K))[:, :, None] for part in parts)
            q = rotated(q, *now)
            keys, values = self.kv[i]
            if self.rotate_all:
                keys, values = (
                    torch.cat([kept[:, :, : self.sinks], kept[:, :, self.sinks + 1 :], new], 2)
                    for kept, new in ((keys, k), (values, v))
                )
                self.kv[i] = keys, values
                keys = rotated(keys, *self.tables)
            else:
                keys.index_copy_(2, slot, rotated(k, *now))
                values.index_copy_(2, slot, v)
            mixed = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
            x = x + F.linear(mixed[:, :, 0].flatten(1), out)
            gate, up = F.linear(F.rms_norm(x, D, norms[1]), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x, D, self.norm), self.head).argmax(-1)


def decoder(
    config: ModelConfig, sinks: int, recent: int, rows: int, *, rotate_all: bool, mode: str, device: torch.device, steps: int
) -> Callable[[], Any]:  # fmt: skip
    """A call that decodes `steps` tokens a row in bfloat16. mode: of torch.compile, "" for none."""
    with torch.device(device):
        model = Llama(config, sinks, recent, rows, rotate_all).ready(device, torch.bfloat16)
    step = torch.compile(model, mode=mode, fullgraph=True) if mode else model
    token = torch.zeros(rows, dtype=torch.long, device=device)
    place = torch.tensor([10_000], device=device)

    def run() -> torch.Tensor:
        nonlocal token
        with torch.inference_mode():
            for _ in range(steps):
                token = step(token, place).clone()  # a graph writes its output over the last one
                place.add_(1)
        return token

    return run


def hugging_face(
    config: ModelConfig, capacity: int, rows: int, *, static: bool, device: torch.device, steps: int
) -> Callable[[], Any]:
    """The same by transformers' LlamaForCausalLM, which does no streaming: each token is read with `capacity` - 1 others."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache  # pyright: ignore[reportMissingImports]  # extra: peers

    c = config
    hf = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_dim, num_hidden_layers=c.depth,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
        max_position_embeddings=2 * capacity, tie_word_embeddings=c.tie_embeddings, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(hf).to(torch.bfloat16).eval()
    past = StaticCache(config=hf, max_cache_len=capacity + steps) if static else DynamicCache()
    token = torch.zeros(rows, 1, dtype=torch.long, device=device)
    step = (
        torch.compile(model, mode="reduce-overhead") if static and device.type == "cuda" else model
    )
    with torch.inference_mode():
        model(token.expand(rows, capacity - 1), past_key_values=past, use_cache=True)
    place = torch.tensor([capacity - 1], device=device)

    def run() -> torch.Tensor:
        nonlocal token
        with torch.inference_mode():
            for _ in range(steps):
                logits = step(
                    token, past_key_values=past, use_cache=True, position_ids=place[None]
                ).logits
                token = logits[:, -1:].argmax(-1).clone()
                past.crop(-1)
        return token

    return run
