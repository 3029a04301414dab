"""Next-character prediction on a long text: the paper's char-RNN (section 3.3.2, figure 3), and what its tasks share.

Legend: B batch, T characters, V vocabulary, D inputs, H hidden units, G the four gates' units (4 H).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from common.nn.module import define
from experiments.metaopt.grid import Task
from sinks.text import documents


class LSTM(nnx.Module):
    """One layer, torch's: gates i, f, g, o, everything uniform in +-1/sqrt(hidden). Torch's two biases are one here."""

    def __init__(self, n_in: int, hidden: int, rngs: nnx.Rngs):
        bound = hidden**-0.5

        def uniform(*shape):
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        self.input = uniform(n_in, 4 * hidden)
        self.recurrent = uniform(hidden, 4 * hidden)
        self.bias = uniform(4 * hidden)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Hidden states [B, T, H], from a state of zeros."""
        recurrent_HG = self.recurrent[...]
        # The inputs' part of all gates at once; only the recurrent part has to wait for its turn.
        gates_TBG = jnp.einsum("BTD,DG->TBG", x_BTD, self.input[...])
        gates_TBG = gates_TBG + self.bias[...][None, None]

        def step(carry, gates_BG):
            h_BH, c_BH = carry
            i, f, g, o = jnp.split(gates_BG + h_BH @ recurrent_HG, 4, axis=-1)
            c_BH = jax.nn.sigmoid(f) * c_BH + jax.nn.sigmoid(i) * jnp.tanh(g)
            h_BH = jax.nn.sigmoid(o) * jnp.tanh(c_BH)
            return (h_BH, c_BH), h_BH

        zeros_BH = jnp.zeros((len(x_BTD), len(recurrent_HG)))
        return jax.lax.scan(step, (zeros_BH, zeros_BH), gates_TBG)[1].swapaxes(0, 1)


class CharRNN(nnx.Module):
    """One-hot characters -> `depth` LSTM layers -> logits [B, T, V] of the next character (Karpathy 2015)."""

    def __init__(self, vocabulary: int, hidden: int, depth: int, rngs: nnx.Rngs):
        self.vocabulary = vocabulary
        widths = [vocabulary] + [hidden] * (depth - 1)
        self.layers = nnx.Dict(
            {f"layer{i}": LSTM(width, hidden, rngs) for i, width in enumerate(widths)}
        )
        self.head = nnx.Linear(hidden, vocabulary, rngs=rngs)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        x_BTD = jax.nn.one_hot(ids_BT, self.vocabulary)
        for layer in self.layers.values():
            x_BTD = layer(x_BTD)
        return self.head(x_BTD)


def charrnn_task(
    where: str, hidden: int = 128, depth: int = 2, length: int = 50, examples: int | None = None
) -> Task:
    """The char-RNN on the text at `where` (see `sinks.text.documents`)."""
    if depth < 1:
        raise ValueError(f"depth={depth}: a char-RNN has at least 1 layer")

    def net(vocabulary: int):
        module = define(lambda rngs: CharRNN(vocabulary, hidden, depth, rngs))
        return module.init, module

    return text_task("charrnn", where, net, length, examples)


def text_task(
    name: str,
    where: str,
    net: Callable[[int], tuple[Callable[[jax.Array], Any], Callable[[Any, jax.Array], jax.Array]]],
    length: int,
    examples: int | None = None,
    held_out: float = 0.2,
) -> Task:
    """Windows of `length` characters, each to predict from those before it in its window; the score is the perplexity.

    The last `held_out` part of the text is the test.

    Args:
      net: number of different characters -> (key -> params, (params, ids [B, T]) -> logits [B, T, V]).
      examples: at most so many windows of each part; None for all.
    """
    vocabulary, (train, test) = windows(where, length, held_out, examples)
    init, logits = net(vocabulary)
    test_NT = jnp.asarray(test)

    def nll(params: Any, ids_BT: jax.Array) -> jax.Array:
        logits_BTV = logits(params, ids_BT[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, ids_BT[:, 1:])

    def loss(params: Any, batch: dict, key: jax.Array) -> jax.Array:
        return nll(params, batch["ids"]).mean()

    def score(params: Any) -> dict[str, jax.Array]:
        each = jax.lax.map(
            lambda ids: nll(params, ids[None]).mean(), test_NT, batch_size=min(256, len(test))
        )
        return {"perplexity": jnp.exp(each.mean())}

    # A CPU core has its hands full with one cell; an accelerator waits for work with one.
    side_by_side = jax.default_backend() != "cpu"
    return Task(name, init, loss, score, {"ids": train}, side_by_side)


def windows(
    where: str, length: int, held_out: float, examples: int | None = None
) -> tuple[int, tuple[np.ndarray, np.ndarray]]:
    """How many different characters the text has, and its windows for training and test: ids, int32 [N, length + 1].

    A window's last character is the next one's first: every character but the first is predicted once.

    Raises ValueError where there is no such text or it is too short.
    """
    if length < 2:
        raise ValueError(f"length={length}: a window has at least 2 characters")
    text = "\n\n".join(document.text for document in documents(where))
    characters, ids = np.unique(
        np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True
    )
    cut = int(len(ids) * (1 - held_out))
    parts = []
    for part in (ids[:cut], ids[cut:]):
        count = (len(part) - 1) // length
        if count < 1:
            raise ValueError(
                f"text {where!r} has {len(ids)} characters: too few for length={length}"
            )
        count = min(count, examples or count)
        first = length * np.arange(count)[:, None]
        parts.append(part[first + np.arange(length + 1)].astype(np.int32))
    return len(characters), (parts[0], parts[1])
