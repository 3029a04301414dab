"""A small GPT on the characters of a text, for the robustness benchmark (nanoGPT's shape).

Legend: B batch, T characters, V vocabulary, D width.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
from flax import nnx

from common.mesh import MeshSpec, make_mesh
from common.nn.layers import INIT, Block, LayerNorm, Linear
from common.nn.module import Module, Params, define, init_stack, scan_stack
from common.nn.ops import Policy
from experiments.metaopt.grid import Task
from experiments.metaopt.tasks.text import text_task

HEAD = 32  # width of an attention head


class Embedding(nnx.Module):
    """Characters and their places, each a row of a table."""

    def __init__(self, vocabulary: int, length: int, width: int, rngs: nnx.Rngs):
        self.characters = nnx.Param(INIT(rngs.params(), (vocabulary, width)))
        self.places = nnx.Param(INIT(rngs.params(), (length, width)))

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        return self.characters[...][ids_BT] + self.places[...][None, : ids_BT.shape[1]]


@dataclass(frozen=True)
class GPT:
    """Embeddings -> pre-norm blocks that see the past -> LayerNorm -> logits."""

    vocabulary: int
    length: int
    width: int
    depth: int
    policy: Policy = Policy()

    def __post_init__(self):
        if self.width < HEAD or self.width % HEAD or self.depth < 1:
            raise ValueError(
                f"a GPT of width {self.width}, depth {self.depth}: the width must be a multiple of {HEAD}, "
                "the depth at least 1"
            )

    @cached_property
    def _parts(self) -> dict[str, Module]:
        V, D, policy = self.vocabulary, self.width, self.policy
        return {
            "embedding": define(lambda rngs: Embedding(V, self.length, D, rngs)),
            "block": define(lambda rngs: Block(D, D // HEAD, 4 * D, policy, rngs, causal=True)),
            "norm": define(lambda rngs: LayerNorm(D, policy, rngs)),
            "head": define(lambda rngs: Linear(D, V, policy, rngs)),
        }

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters {"embedding", "blocks" (stacked on a leading layer axis), "norm", "head"}."""
        key, k_blocks = jax.random.split(key)
        ends = [name for name in self._parts if name != "block"]
        params = {
            name: self._parts[name].init(k)
            for name, k in zip(ends, jax.random.split(key, len(ends)))
        }
        return {**params, "blocks": init_stack(self._parts["block"], self.depth, k_blocks)}

    def __call__(self, params: Params, ids_BT: jax.Array) -> jax.Array:
        """Logits [B, T, V]: each place sees itself and those before it."""
        x_BTD = scan_stack(
            self._parts["block"],
            params["blocks"],
            self._parts["embedding"](params["embedding"], ids_BT),
            unroll=self.policy.blocks_per_turn(self.depth),
        )
        return self._parts["head"](params["head"], self._parts["norm"](params["norm"], x_BTD))


def gpt_task(
    where: str, hidden: int = 128, depth: int = 4, length: int = 64, examples: int | None = None
) -> Task:
    """The GPT on the text at `where` (see `sinks.text.documents`)."""

    def net(vocabulary: int):
        policy = Policy().built_for(make_mesh(MeshSpec()))
        gpt = GPT(vocabulary, length, hidden, depth, policy)
        return gpt.init, gpt

    return text_task("gpt", where, net, length, examples)
