"""Tokenizers from files: `tokenizer.json` and the files next to it, or rebuilt from GGUF metadata."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from sinks.fields import FLAG, NUMBERS, TEXT, Field, Kind, count, either, list_of, read
from sinks.tokenizer import Tokenizer
from sinks.weights import read_json

T = TypeVar("T")
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
_WHOLE_FIRST = (
    "llama-bpe",
    "llama3",
)  # a piece that is a token is taken whole, not split by the merges

# What a folder's JSON files and a GGUF file's metadata may say of a tokenizer.
_TOKEN = either(TEXT, Kind("an object with content", lambda v: TEXT.holds(_content(v))))
_NAMED = Kind("", lambda v: isinstance(v, dict) and all(TEXT.holds(v.get(k)) for k in _TEMPLATE))
_TEMPLATE = ("name", "template")
_SETTINGS = {
    "bos_token": Field(_TOKEN, default=None, null=None),
    "eos_token": Field(_TOKEN, default=None, null=None),
    "chat_template": Field(
        either(TEXT, list_of(_NAMED, "objects with name and template")), default="", null=""
    ),
}
_IDS = either(count(0), list_of(count(0), "token ids"))
_GENERATION = {"eos_token_id": Field(_IDS, default=None, null=None)}
_TEXTS = list_of(Kind("", lambda v: isinstance(v, str) and len(v) <= 4096), "short texts")
_GGUF = {
    "model": Field(TEXT),
    "tokens": Field(_TEXTS),
    "pre": Field(TEXT, default="default"),
    "merges": Field(_TEXTS, default=None),
    "scores": Field(NUMBERS, default=None),
    "token_type": Field(list_of(count(0, 6), "token types, 0 to 6"), default=None),
    "add_space_prefix": Field(FLAG, default=True),
    **{
        f"{kind}_token_id": Field(count(0), default=None)
        for kind in ("bos", "eos", "eot", "eom", "unknown")
    },
}


def _content(token: Any) -> Any:
    """A special token's text, which some files wrap in an object."""
    return token.get("content") if isinstance(token, dict) else token


def from_folder(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Raises ValueError, naming the file, for what is missing or damaged, and where they do not belong together.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json: save the tokenizer with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    backend = _built(lambda: tokenizers.Tokenizer.from_file(str(path)), f"{path} cannot be read")
    backend.no_truncation()
    backend.no_padding()
    _check_round_trip(backend, str(path))
    settings = _read(folder / "tokenizer_config.json", _SETTINGS)
    template = settings["chat_template"]
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default") or next(iter(named.values()), "")
    if (file := folder / "chat_template.jinja").is_file():
        try:
            template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no UTF-8 text ({error}): fetch it again") from error

    def token(name: str) -> int | None:
        if (text := _content(settings[name])) is None:
            return None
        if (i := backend.token_to_id(text)) is None:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: {name}={text!r} is no token of tokenizer.json. Set it to null if "
                "the model has none"
            )
        return i

    ends = _read(folder / "generation_config.json", _GENERATION)["eos_token_id"]
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    known = Tokenizer(backend, token("bos_token"), _unique(token("eos_token"), *ends), template)
    if wrong := [i for i in ends if i >= known.vocab_size]:
        raise ValueError(
            f"{folder / 'generation_config.json'}: eos_token_id={wrong[0]}, tokenizer.json has tokens below "
            f"{known.vocab_size}"
        )
    return known


def _unique(*ids: int | None) -> tuple[int, ...]:
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _read(path: Path, table: Mapping[str, Field]) -> dict[str, Any]:
    return read(read_json(path) if path.is_file() else {}, table, str(path))


def _built(make: Callable[[], T], problem: str) -> T:
    """What `make` makes. The tokenizers package raises plain Exception, and panics (no Exception) on some damage."""
    try:
        return make()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{problem}: {error}") from error


def _check_round_trip(backend: tokenizers.Tokenizer, where: str) -> None:
    """That tokens of several characters come back from their text. None does where the merges are lost: all text would
    be read letter by letter, without an error."""
    special = backend.get_added_tokens_decoder()
    longer = sorted(i for t, i in backend.get_vocab().items() if len(t) > 1 and i not in special)
    sample = longer[:: 1 + len(longer) // 256]

    def comes_back(i: int) -> bool:
        return backend.encode(backend.decode([i]), add_special_tokens=False).ids == [i]

    def any_comes_back() -> bool:
        backend.encode("a B\n1é😀", add_special_tokens=False)
        return not sample or any(map(comes_back, sample))

    if not _built(any_comes_back, f"{where}: its tokenizer fails"):
        raise ValueError(
            f"{where}: of {len(sample)} tokens none comes back from its own text: the merges are missing or damaged"
        )


def from_gguf(metadata: Mapping[str, Any], where: str = "this GGUF file") -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describe: byte-level BPE ("gpt2"), or a SentencePiece BPE ("llama").

    Raises ValueError for other kinds, naming them, and for metadata that are damaged; `where` names the file.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        raise ValueError(f"{where} holds no tokenizer (tokenizer.ggml.tokens)")
    keys = read(metadata, _GGUF, where, "tokenizer.ggml.")
    template = read(metadata, {"tokenizer.chat_template": Field(TEXT, default="")}, where)
    tokens, types = keys["tokens"], keys["token_type"] or []
    vocabulary = {token: i for i, token in enumerate(tokens)}
    _check_gguf(keys, vocabulary, where)
    if keys["model"] == "gpt2":
        backend = _byte_level(vocabulary, keys["merges"], keys["pre"], where)
    elif keys["model"] == "llama":
        unknown = tokens[keys["unknown_token_id"] or 0]
        backend = _sentencepiece(vocabulary, keys["scores"], unknown, keys["add_space_prefix"])
    else:
        raise ValueError(
            f"{where}: tokenizer.ggml.model={keys['model']!r}: 'gpt2' and 'llama' can be rebuilt"
        )
    for token, type_ in zip(tokens, types):
        added = AddedToken(token, special=type_ == _CONTROL, normalized=False)
        if type_ == _CONTROL:
            backend.add_special_tokens([added])
        elif type_ == _USER_DEFINED:
            backend.add_tokens([added])
    _check_round_trip(backend, where)
    ends = _unique(*(keys[f"{kind}_token_id"] for kind in ("eos", "eot", "eom")))
    return Tokenizer(backend, keys["bos_token_id"], ends, template["tokenizer.chat_template"])


def _check_gguf(keys: Mapping[str, Any], vocabulary: Mapping[str, int], where: str) -> None:
    """What must hold between the keys of tokenizer.ggml."""
    n, problems = len(keys["tokens"]), []
    if len(vocabulary) != n:
        problems.append(f"tokens has {n} entries, {n - len(vocabulary)} of them twice")
    for name in ("scores", "token_type"):
        if keys[name] is not None and len(keys[name]) != n:
            problems.append(f"{name} has {len(keys[name])} entries for {n} tokens")
    for name, value in keys.items():
        if name.endswith("_token_id") and value is not None and value >= n:
            problems.append(f"{name}={value}, there are {n} tokens")
    if (needed := {"gpt2": "merges", "llama": "scores"}.get(keys["model"])) and not keys[needed]:
        problems.append(f"{needed} is missing")
    if problems:
        raise ValueError(f"{where}: tokenizer.ggml.{'; tokenizer.ggml.'.join(problems)}")


def _byte_level(
    vocabulary: dict[str, int], merges: list[str], pre: str, where: str
) -> tokenizers.Tokenizer:
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{where}: tokenizer.ggml.pre={pre!r}: {', '.join(_PRE_TOKENIZERS)} can be rebuilt. Put the model's own "
            "tokenizer.json next to the GGUF file, and it is used instead"
        )
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    for i, (left, right) in enumerate(pairs):
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise ValueError(
                f"{where}: tokenizer.ggml.merges[{i}]={merges[i]!r} joins what tokenizer.ggml.tokens does not hold"
            )
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in _WHOLE_FIRST))
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
