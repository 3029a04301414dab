"""Questions in a stream: StreamEval's registers (paper 4.3, Table 7) and multiple choice, one after the other (Table 5).

A task is a text in which some stretches are answers. The right answers are part of the stream, so one pass in chunks
tells for every answer whether greedy decoding would have given it: each of its tokens must be the likeliest after those
before it. That is the exact match of the paper, without decoding token by token.

Legend: B rows, T tokens of a chunk, N tokens of a text.
"""

import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sinks import cache as caches
from sinks import stream
from sinks.cache import Cache, CacheSpec
from sinks.config import ModelConfig
from sinks.params import Params
from sinks.progress import track
from sinks.tokenizer import Tokenizer

_LOGIT_TOKENS = 64  # tokens whose logits exist at a time
_ADJECTIVES = (
    "red old big dark cold wild quiet golden broken empty green heavy soft little warm bright narrow "
    "hidden sweet busy wooden silver hungry gentle"
)
_NOUNS = (
    "horse river table garden window bridge mountain doctor kitchen engine forest island letter market "
    "pencil rocket saddle temple violin wagon castle candle basket hammer mirror blanket tower ship "
    "lemon farmer"
)
_NAMES = tuple(
    f"the {adjective} {noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()
)


class Answer(NamedTuple):
    """A stretch of a text, start to stop (characters, or tokens after `tokenize`), and which kind of question it answers."""

    start: int
    stop: int
    kind: int


class Task(NamedTuple):
    """A text and its answers, in order."""

    text: str
    answers: tuple[Answer, ...]


class _Writer:
    """Text in pieces, of which some are answers."""

    def __init__(self):
        self.pieces, self.length, self.answers = [], 0, []

    def add(self, text: str, kind: int | None = None) -> None:
        if kind is not None:
            self.answers.append(Answer(self.length, self.length + len(text), kind))
        self.pieces.append(text)
        self.length += len(text)

    def task(self) -> Task:
        return Task("".join(self.pieces), tuple(self.answers))


@dataclass(frozen=True)
class StreamEval:
    """Lines that each give a register a random value, and now and then a question about a line some way back.

    The authors never released their set; this is its description (docs/papers/streamingllm.md 1.9).

    Attributes:
      queries: questions in a text.
      every: lines between two questions.
      distances: how many lines back questions ask, in turn; the kind of an Answer. The paper's main setting is (20,). A
        line that was asked before is left out for the one before it.
      digits: of a value.
      keys: what a line is called: "lines", by its number, as in the paper; or "names", such as "the quiet river", which
        models of 100 million parameters can tell apart, where they cannot tell numbers.
    """

    queries: int = 100
    every: int = 10
    distances: tuple[int, ...] = (20,)
    digits: int = 5
    keys: str = "lines"

    def __post_init__(self):
        for name in ("queries", "every", "digits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        if not self.distances or min(self.distances) < 1:
            raise ValueError(f"distances={self.distances}: at least one, each at least 1")
        if self.keys not in ("lines", "names"):
            raise ValueError(f"keys={self.keys!r}: 'lines' or 'names'")
        if self.keys == "names" and self.lines > len(_NAMES):
            raise ValueError(
                f"{self.lines} lines need as many names, there are {len(_NAMES)}: ask fewer queries"
            )

    @property
    def lines(self) -> int:
        """Token ids of a text."""
        return max(self.distances) + self.every * self.queries

    def task(self, seed: int) -> Task:
        """One text; the same for the same seed."""
        rng = np.random.default_rng(seed)
        if self.keys == "lines":
            keys = [f"in line {i}" for i in range(self.lines)]
        else:
            keys = [f"of {_NAMES[i]}" for i in rng.permutation(len(_NAMES))]
        writer, values, asked = _Writer(), [], set()
        writer.add("Below is a record. Remember the register content of each line.\n\n")
        for query in range(self.queries):
            lines = max(self.distances) + self.every if query == 0 else self.every
            for _ in range(lines):
                writer.add(f"The register content {keys[len(values)]} is ")
                values.append(int(rng.integers(10 ** (self.digits - 1), 10**self.digits)))
                writer.add(f"<{values[-1]}>.\n")
            distance = self.distances[query % len(self.distances)]
            line = len(values) - 1 - distance
            while line in asked:  # its value stands in the answer then
                line -= 1
            asked.add(line)
            writer.add(f"\nQuestion: What is the register content {keys[line]}?\n")
            writer.add(f"Answer: The register content {keys[line]} is <")
            writer.add(str(values[line]), distance)
            writer.add(">.\n\n")
        return writer.task()


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer` is one of `choices`."""

    text: str
    choices: tuple[str, ...]
    answer: str


def read_questions(where: str) -> list[Question]:
    """Questions from "embedded" (general knowledge, made for this package), or from a JSONL file.

    A line is {"question": text, "choices": [texts], "answer": text or index}, or as in the ARC files,
    {"question": {"stem": text, "choices": [{"text", "label"}]}, "answerKey": label}. Raises ValueError naming the line
    that is neither.
    """
    if where == "embedded":
        path = importlib.resources.files("sinks") / "data" / "quiz.jsonl"
    else:
        path = Path(where).expanduser()
        if not path.is_file():
            raise ValueError(f"questions {where!r}: no such file. 'embedded' is always there")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            questions.append(_question(json.loads(line)))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{where}:{number} is no question ({error!r}): {line[:80]}") from error
    if len(questions) < 2:
        raise ValueError(f"{where} holds {len(questions)} questions: at least 2 are needed")
    return questions


def _question(item: dict[str, Any]) -> Question:
    text, answer = item["question"], item.get("answer", "")
    if isinstance(text, dict):
        by_label = {choice["label"]: choice["text"] for choice in text["choices"]}
        return Question(text["stem"], tuple(by_label.values()), by_label[item["answerKey"]])
    choices = tuple(item["choices"])
    answer = choices[answer] if isinstance(answer, int) else answer
    if answer not in choices:
        raise ValueError(f"answer {answer!r} is not among the choices")
    return Question(text, choices, answer)


def qa_stream(questions: Sequence[Question], count: int, seed: int) -> Task:
    """`count` questions with their answers, one after the other, in random order, choices too; all are asked before any
    comes again. The kind of an Answer is 0 the first time, 1 the second..."""
    rng, writer = np.random.default_rng(seed), _Writer()
    for i in range(count):
        if i % len(questions) == 0:
            order = rng.permutation(len(questions))
        _write_question(writer, questions[order[i % len(questions)]], rng, i // len(questions))
    return writer.task()


def qa_alone(questions: Sequence[Question], count: int, seed: int) -> list[Task]:
    """The same questions, each a text of its own behind one example: what a stream is compared with."""
    rng, tasks = np.random.default_rng(seed), []
    order = np.concatenate(
        [rng.permutation(len(questions)) for _ in range(-(-count // len(questions)))]
    )
    for i in order[:count]:
        writer = _Writer()
        example = (i + rng.integers(1, len(questions))) % len(questions)
        _write_question(writer, questions[example], rng, None)
        _write_question(writer, questions[i], rng, 0)
        tasks.append(writer.task())
    return tasks


def _write_question(
    writer: _Writer, question: Question, rng: np.random.Generator, kind: int | None
):
    choices = ", ".join(question.choices[i] for i in rng.permutation(len(question.choices)))
    writer.add(f"Question: {question.text}\nChoices: {choices}\nAnswer:")
    writer.add(f" {question.answer}", kind)
    writer.add("\n\n")


def tokenize(
    tokenizer: Tokenizer, task: Task, *, bos: bool = True
) -> tuple[np.ndarray, tuple[Answer, ...]]:
    """Token ids [N] and the answers' places among them: every token that holds a character of the answer."""
    ids, spans = tokenizer.encode_with_places(task.text)
    front = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    starts, stops = np.asarray(spans).T
    answers = []
    for answer in task.answers:
        first = int(np.searchsorted(stops, answer.start, side="right"))
        last = int(np.searchsorted(starts, answer.stop, side="left"))
        answers.append(Answer(first + len(front), last + len(front), answer.kind))
    return np.asarray([*front, *ids], np.int32), tuple(answers)


def exact_matches(hits_N: np.ndarray, answers: Sequence[Answer]) -> np.ndarray:
    """Which answers greedy decoding gives, bool, from `greedy_hits` of the text."""
    return np.array([hits_N[a.start : a.stop].all() for a in answers], bool)


def greedy_hits(
    config: ModelConfig,
    params: Params,
    spec: CacheSpec,
    texts: Sequence[np.ndarray],
    *,
    chunk: int = 512,
    what: str = "",
) -> list[np.ndarray]:
    """Whether each token of each text is the likeliest after those that its stream still sees: bool [N] per text.

    Texts are rows of one batch of streams. The first token of a text is never a hit.

    Args:
      params: with stacked blocks.
      what: names the progress bar; without it there is none.
    """
    rows = [stream.check_tokens(config, text) for text in texts]
    lengths = np.array([len(row) for row in rows])
    padded_BN = np.zeros((len(rows), -(-lengths.max() // chunk) * chunk + 1), np.int32)
    for b, row in enumerate(rows):
        padded_BN[b, : len(row)] = row
    cache = caches.init(config, spec, len(rows), stacked=True)
    hits_BN = np.zeros(padded_BN.shape, bool)
    for at in track(range(0, lengths.max(), chunk), what):
        n_B = np.clip(lengths - at, 0, chunk).astype(np.int32)
        tokens_BT, next_BT = padded_BN[:, at : at + chunk], padded_BN[:, at + 1 : at + chunk + 1]
        hit_BT, cache = _hits_chunk(config, params, cache, tokens_BT, next_BT, n_B)
        hits_BN[:, at + 1 : at + chunk + 1] = hit_BT
    return [hits[:n] for hits, n in zip(hits_BN, lengths)]


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _hits_chunk(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    next_BT: jax.Array,
    n_B: jax.Array,
) -> tuple[jax.Array, Cache]:
    x_BTD, cache = stream.hidden(config, params, cache, tokens_BT, n_B)
    B, T, D = x_BTD.shape
    some = min(_LOGIT_TOKENS, T)
    x = jnp.pad(x_BTD, ((0, 0), (0, -T % some), (0, 0))).reshape(B, -1, some, D).swapaxes(0, 1)
    best = jax.lax.map(lambda x_BRD: stream.unembed(config, params, x_BRD).argmax(-1), x)
    return best.swapaxes(0, 1).reshape(B, -1)[:, :T] == next_BT, cache
