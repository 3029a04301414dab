"""Text to token ids and back, through the tokenizers package: from `tokenizer.json`, or rebuilt from GGUF metadata.

No token is added by `encode`: what a stream's first tokens are, and so its sinks, is the caller's choice.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_WAIT = (
    64  # tokens that TextStream keeps back at most, where bytes never become a character
)
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF

# What splits text before BPE, by `tokenizer.ggml.pre`. ByteLevel with its own pattern is GPT-2's.
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
_PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
}


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

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self.backend.get_vocab_size()

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
        try:
            return self._template.render(
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
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot be read: {error}") from error

    def _token(self, token: int | None) -> str:
        return "" if token is None else self.backend.id_to_token(token) or ""


class _Generation(jinja2.ext.Extension):
    """{% generation %}, with which templates mark what a model is trained to write: its content, as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
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


def from_folder(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json: save the tokenizer with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{path} cannot be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    settings = _json(folder / "tokenizer_config.json")
    template = settings.get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default") or next(iter(named.values()), "")
    if (file := folder / "chat_template.jinja").is_file():
        template = file.read_text(encoding="utf-8")

    def token(name: str) -> int | None:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return None if value is None else backend.token_to_id(value)

    ends = _json(folder / "generation_config.json").get("eos_token_id") or []
    ends = _unique(token("eos_token"), *(ends if isinstance(ends, list) else [ends]))
    return Tokenizer(backend, token("bos_token"), ends, template)


def _unique(*ids: int | None) -> tuple[int, ...]:
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describe: byte-level BPE ("gpt2"), or a SentencePiece BPE ("llama").

    Raises ValueError for other kinds, naming them.
    """

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    tokens = get("tokens")
    if tokens is None:
        raise ValueError("this GGUF file holds no tokenizer (tokenizer.ggml.tokens)")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if (kind := get("model")) == "gpt2":
        backend = _byte_level(vocabulary, get("merges", []), get("pre", "default"))
    elif kind == "llama":
        unknown = tokens[get("unknown_token_id", 0)]
        backend = _sentencepiece(
            vocabulary, get("scores", []), unknown, get("add_space_prefix", True)
        )
    else:
        raise ValueError(f"tokenizer.ggml.model={kind!r}: 'gpt2' and 'llama' can be rebuilt")
    for token, type_ in zip(tokens, get("token_type", [])):
        added = AddedToken(token, special=type_ == _CONTROL, normalized=False)
        if type_ == _CONTROL:
            backend.add_special_tokens([added])
        elif type_ == _USER_DEFINED:
            backend.add_tokens([added])
    ends = _unique(*(get(f"{kind}_token_id") for kind in ("eos", "eot", "eom")))
    return Tokenizer(
        backend, get("bos_token_id"), ends, metadata.get("tokenizer.chat_template", "")
    )


def _byte_level(vocabulary: dict[str, int], merges: list[str], pre: str) -> tokenizers.Tokenizer:
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre={pre!r}: {', '.join(_PRE_TOKENIZERS)} can be rebuilt. Put the model's own "
            "tokenizer.json beside the GGUF file, and it is used instead"
        )
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    vocabulary: dict[str, int], scores: list[float], unknown: str, prefix: bool
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE has no list of merges: any two pieces whose union is a piece may be joined, best score first."""
    merges = []
    for piece, i in vocabulary.items():
        cuts = ((piece[:n], piece[n:]) for n in range(1, len(piece)))
        known = [(a, b) for a, b in cuts if a in vocabulary and b in vocabulary]
        merges += [(-scores[i], vocabulary[a], vocabulary[b], a, b) for a, b in known]
    pairs = [(a, b) for *_, a, b in sorted(merges)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend
