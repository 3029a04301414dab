"""Pretraining with and without a place for attention to go (paper 3.3, Table 3; docs/papers/streamingllm.md 1.8).

  vanilla   the first tokens of a text become the sink by themselves
  zero      SoftMax1: a logit of 0 that belongs to no key
  logit     the same with a learned logit for each head
  token     one more token in the vocabulary, in front of every sample: the paper's learnable sink
  tokens2   two of them

Legend: B samples, T tokens, S sink tokens, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from common.metrics import Metrics, mean
from common.optim import Log
from sinks import params as layouts
from sinks import stream
from sinks.cache import CacheSpec
from sinks.config import ModelConfig

SINK_TOKENS = {"vanilla": 0, "zero": 0, "logit": 0, "token": 1, "tokens2": 2}
SINK_LOGITS = {"zero": "zero", "logit": "learned"}


@dataclass(frozen=True)
class LanguageModel:
    """The recipe the train loop runs (protocol: common/recipe.py).

    Attributes:
      model: its vocabulary ends in the sink tokens.
      tx: the optimizer (`decays` says what of the parameters decays).  log: what the log shows of it.
      sink_tokens: S, in front of every sample, in training as in streaming.
      compute: type of the products' operands, "float32" or "bfloat16"; parameters stay float32.
    """

    model: ModelConfig
    tx: optax.GradientTransformation
    sink_tokens: int = 0
    compute: str = "float32"
    log: Log = lambda opt_state, step: {}

    def __post_init__(self):
        if self.compute not in ("float32", "bfloat16"):
            raise ValueError(f"compute={self.compute!r}: float32 or bfloat16")

    @property
    def front(self) -> tuple[int, ...]:
        """The sink tokens' ids, which begin every text."""
        return tuple(range(self.model.vocab_size - self.sink_tokens, self.model.vocab_size))

    def init(self, key: jax.Array) -> dict:
        return layouts.init(self.model, key)

    def init_extra(self, params: dict) -> dict:
        return {}

    def loss(
        self, params: dict, extra: dict, batch: dict, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """Mean -log p in nats of tokens 2 to T of {"tokens": [B, T]}: the same ones for every variant."""
        tokens_BT = batch["tokens"]
        front_BS = jnp.broadcast_to(
            jnp.array(self.front, jnp.int32), (len(tokens_BT), self.sink_tokens)
        )
        inputs_BT = jnp.concatenate([front_BS, tokens_BT[:, :-1]], 1)
        params = jax.tree.map(lambda p: p.astype(self.compute) if p.ndim > 1 else p, params)
        dense = CacheSpec(sinks=0, recent=inputs_BT.shape[1])
        x_BTD = stream.hidden_from_start(self.model, params, dense, inputs_BT)
        logits_BTV = stream.unembed(self.model, params, x_BTD[:, self.sink_tokens :])
        nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
        return nll_BT.mean(), {"loss": mean(nll_BT)}

    def update_extra(self, extra: dict, params: dict, step: jax.Array) -> dict:
        return extra

    def param_axes(self, abstract: Any) -> Any:
        # The train loop's rules know no "vocab": embeddings are split over their width.
        axes = layouts.logical_axes(self.model)
        known = lambda names: tuple(None if name == "vocab" else name for name in names)  # noqa: E731
        return jax.tree.map(known, axes, is_leaf=lambda x: isinstance(x, tuple))

    def extra_axes(self, abstract: Any) -> Any:
        return {}


def decays(params: dict) -> dict:
    """True for what weight decay applies to: kernels and embeddings, not biases, norms and sink logits."""

    def by_rank(path, leaf) -> bool:
        return leaf.ndim - (path[0].key == "blocks") > 1

    return jax.tree_util.tree_map_with_path(by_rank, params)


def variant(name: str, model: ModelConfig, **recipe: Any) -> LanguageModel:
    """The recipe of one of SINK_TOKENS' names; `model` is without sinks, its vocabulary the text's."""
    if name not in SINK_TOKENS:
        raise ValueError(f"variant {name!r}: known are {', '.join(SINK_TOKENS)}")
    count = SINK_TOKENS[name]
    model = replace(
        model, vocab_size=model.vocab_size + count, sink_logits=SINK_LOGITS.get(name, "none")
    )
    return LanguageModel(model, sink_tokens=count, **recipe)
