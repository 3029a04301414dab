"""Text to token ids and back, through the tokenizers package.

No token is added by `encode`: what a stream's first tokens are, and so its sinks, is the caller's choice.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TypeVar

import jinja2
import jinja2.sandbox
import tokenizers
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser

T = TypeVar("T")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_WAIT = 64  # tokens that TextStream keeps back at most, where bytes never become text


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    Attributes:
      backend: the tokenizers package's object.
      bos_id: the token that begins a text, None where there is none.
      eos_ids: the tokens that end an answer, the one that templates call eos_token first.
      chat_template: the Jinja template that came with the weights, "" where none did.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str = ""

    @cached_property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return 1 + max(self.backend.get_vocab().values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special tokens written in it ("<|im_start|>") become their ids; nothing is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text`, and where each lies in it: characters start to stop."""
        encoded = self.backend.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """The text of `ids`, without special tokens where `special` is False. Raises ValueError for unknown ids."""
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(
                f"token ids {wrong[:5]} are not in the vocabulary of {self.vocab_size}"
            )
        return self.backend.decode(ids, skip_special_tokens=not special)

    def chat(
        self,
        messages: Iterable[Mapping[str, str]],
        *,
        answer: bool = True,
        now: datetime | None = None,
    ) -> str:
        """The conversation as text, by the weights' own template; `answer` opens the assistant's turn.

        `messages` are {"role": "system", "user" or "assistant", "content": ...}; `now` is what the template's clock shows,
        by default the time. Raises ValueError where the weights came without a template, or theirs refuses the conversation.
        """
        template = self._template
        try:
            return template.render(
                messages=list(messages),
                add_generation_prompt=answer,
                bos_token=self._token(self.bos_id),
                eos_token=self._token(next(iter(self.eos_ids), None)),
                tools=None,
                documents=None,
                strftime_now=(now or datetime.now()).strftime,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        except Exception as error:  # a template is a program: it may add text to a number
            raise ValueError(
                f"the chat template fails on this conversation ({type(error).__name__}: {error})"
            ) from error

    @cached_property
    def _template(self) -> jinja2.Template:
        if not self.chat_template:
            raise ValueError(
                "these weights come without a chat template: they are no chat model. Stream plain text through them"
            )
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        try:
            return environment.from_string(self.chat_template)
        except Exception as error:  # of jinja2, or of Python where the text is too large for it
            raise ValueError(f"the chat template cannot be read: {error}") from error

    def _token(self, token: int | None) -> str:
        return "" if token is None else self.backend.id_to_token(token) or ""


class _Generation(Extension):
    """{% generation %}, with which templates mark what a model is trained to write: its content, as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class TextStream:
    """Text that appears token by token: `push(id)` returns what is new and final, so that pieces add up to `decode`.

    A character whose bytes are spread over several tokens appears with the last of them. Memory does not grow with the
    stream.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = True):
        self._tokenizer, self._special = tokenizer, special
        self._ids: list[int] = []  # the last tokens; decoding the next needs some text before it
        self._settled = 0  # how many of these are shown whole
        self._shown = 0  # characters of their text that are shown

    def push(self, token: int) -> str:
        """The text that `token` completes, often "" or a word."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids, special=self._special)
        whole = text.rstrip(_UNFINISHED)
        waiting = len(self._ids) - self._settled
        if whole != text and waiting < _LONGEST_WAIT:
            piece = whole[self._shown :]
            self._shown = max(self._shown, len(whole))
            return piece
        piece = text[self._shown :]
        last = self._ids[self._settled :]
        if (
            context := self._tokenizer.decode(last, special=self._special)
        ) or waiting >= _LONGEST_WAIT:
            self._ids, self._settled, self._shown = last, len(last), len(context)
        else:  # nothing but hidden special tokens: they are no context
            self._shown = len(text)
        return piece

    def flush(self) -> str:
        """What is still held back: the replacement characters of bytes that never became a character."""
        text = self._tokenizer.decode(self._ids, special=self._special)
        piece = text[self._shown :]
        self._ids, self._settled, self._shown = [], 0, 0
        return piece
