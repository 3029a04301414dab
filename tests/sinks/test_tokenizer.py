"""Text survives the round trip and appears token by token; chat templates come from the weights and are not trusted."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinks import tokenizer_files as tk
from sinks.tokenizer import TextStream
from tests.sinks.checkpoints import CHATML, byte_level_metadata


def sentencepiece_metadata():
    """Llama-2-like: unknown, two control tokens, 256 bytes, pieces whose scores say what joins first."""
    pieces = {
        "▁": -5.0,
        "t": -6.0,
        "h": -7.0,
        "e": -8.0,
        "a": -9.0,
        "he": -2.0,
        "▁t": -1.0,
        "th": -3.0,
    }
    pieces |= {"▁the": -4.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


BYTES = tk.from_gguf(byte_level_metadata())
PIECES = tk.from_gguf(sentencepiece_metadata())
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte level", "sentencepiece"])


@BOTH
@given(text=st.text(max_size=30))
@settings(max_examples=50, deadline=None)
def test_any_text_survives_the_round_trip(tokenizer, text):
    if tokenizer is PIECES:
        text = text.replace("▁", "")  # its sign for a space
    assert tokenizer.decode(tokenizer.encode(text)) == text


def appears_as_decoded(tokenizer, ids, special):
    stream = TextStream(tokenizer, special=special)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, special=special)


@BOTH
@given(texts=st.lists(st.text(max_size=10), max_size=4), special=st.booleans())
@settings(max_examples=100, deadline=None)
def test_what_appears_token_by_token_adds_up_to_the_text(tokenizer, texts, special):
    appears_as_decoded(
        tokenizer, [i for text in texts for i in [1, *tokenizer.encode(text), 2]], special
    )


@given(ids=st.lists(st.integers(0, BYTES.vocab_size - 1), max_size=20), special=st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_ids_appear_as_they_decode(ids, special):
    """Halves of characters, and bytes that never become one."""
    appears_as_decoded(BYTES, ids, special)


@BOTH
def test_a_character_of_several_tokens_appears_whole(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("a😀")
    pieces = [stream.push(i) for i in ids]
    assert len(ids) >= 5 and "".join(pieces) == "a😀"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


@BOTH
def test_an_endless_stream_of_broken_bytes_is_shown_in_constant_memory(tokenizer):
    broken = tokenizer.encode("é" if tokenizer is PIECES else "😀")[-1]
    stream, shown = TextStream(tokenizer), 0
    for _ in range(1000):
        shown += len(stream.push(broken))
        assert len(stream._ids) < 200
    assert shown > 800


def test_merges_digits_and_special_tokens():
    def pieces(text):
        return [BYTES.backend.id_to_token(i) for i in BYTES.encode(text)]

    assert pieces("the the") == ["t", "he", "Ġthe"]
    assert pieces("1234") == ["1", "2", "3", "4"]
    assert BYTES.encode("<|im_start|>h")[0] == 1
    assert BYTES.decode([1, *BYTES.encode("h"), 2], special=False) == "h"


def test_sentencepiece_joins_by_score():
    def pieces(text):
        return [PIECES.backend.id_to_token(i) for i in PIECES.encode(text)]

    assert pieces("the") == ["▁the"]  # ▁t, he, then the two
    assert pieces("a the") == ["▁", "a", "▁the"]
    assert pieces("ä") == ["▁", "<0xC3>", "<0xA4>"]


def test_ids_outside_the_vocabulary_are_named():
    with pytest.raises(ValueError, match=r"\[-1, 263\] are not in the vocabulary of 263"):
        BYTES.decode([1, -1, 263])


def test_the_chat_template_is_the_weights_own():
    text = BYTES.chat([{"role": "user", "content": "the <b>"}])
    assert text == "<|im_start|>user\nthe <b><|im_end|>\n<|im_start|>assistant\n"
    assert BYTES.chat([{"role": "user", "content": "a"}], answer=False).endswith("a<|im_end|>\n")


def test_every_token_that_ends_an_answer_is_known():
    """Llama 3's file has an end of text, which templates mean, and an end of turn, which its answers end in."""
    metadata = byte_level_metadata(eos_token_id=2, eot_token_id=0) | {
        "tokenizer.chat_template": "{{ eos_token }}"
    }
    tokenizer = tk.from_gguf(metadata)
    assert tokenizer.eos_ids == (2, 0) and tokenizer.chat([]) == "<|im_end|>"


def test_a_template_may_refuse_and_may_not_reach_out():
    def chat(template):
        metadata = byte_level_metadata() | {"tokenizer.chat_template": template}
        return tk.from_gguf(metadata).chat([{"role": "user", "content": "a"}])

    with pytest.raises(ValueError, match="refuses this conversation: roles must alternate"):
        chat("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="unsafe"):
        chat("{{ ''.__class__.__mro__ }}")
    with pytest.raises(ValueError, match=r"^the chat template cannot be read"):
        chat("{% if %}")
    with pytest.raises(ValueError, match=r"^these weights come without a chat template"):
        chat("")
    assert chat("{{ bos_token }}{{ messages[0] | tojson }}") == (
        '<|im_start|>{"role": "user", "content": "a"}'
    )


def test_what_cannot_be_rebuilt_is_named():
    with pytest.raises(ValueError, match=r"pre='tekken': gpt-2, smollm.* tokenizer\.json next to"):
        tk.from_gguf(byte_level_metadata(pre="tekken"))
    with pytest.raises(ValueError, match="model='bert'"):
        tk.from_gguf(byte_level_metadata(model="bert"))
    with pytest.raises(ValueError, match="holds no tokenizer"):
        tk.from_gguf({})


def test_a_folder_gives_the_same_tokenizer(tmp_path):
    BYTES.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": {"content": "<|im_start|>"},
                "eos_token": "<|im_end|>",
                "chat_template": [
                    {"name": "tool", "template": "x"},
                    {"name": "default", "template": "y"},
                ],
            }
        )
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    loaded = tk.from_folder(tmp_path)
    assert loaded.encode("the 12é") == BYTES.encode("the 12é")
    assert (loaded.bos_id, loaded.eos_ids, loaded.chat([])) == (1, (2, 0), "y")
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert loaded.chat([]) == "y" and tk.from_folder(tmp_path).chat([]) == "<|im_start|>assistant\n"


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json: save the tokenizer"):
        tk.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model"')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        tk.from_folder(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"merges": ["h q"]}, r"merges\[0\]='h q' joins what tokenizer\.ggml\.tokens does not hold"),
    ({"merges": ["he"]}, r"merges\[0\]='he' joins"),
    ({"merges": []}, "merges is missing"),
    ({"merges": [1]}, r"merges=\[1\], it must be a list of short texts"),
    ({"tokens": ["a", 1]}, "tokens=.*, it must be a list of short texts"),
    ({"tokens": ["a", "a"]}, "tokens has 2 entries, 1 of them twice"),
    ({"token_type": [1]}, "token_type has 1 entries for 263 tokens"),
    ({"token_type": [99] * 263}, "token_type=a list of 263, it must be a list of token types"),
    ({"bos_token_id": 263}, "bos_token_id=263, there are 263 tokens"),
    ({"eot_token_id": -1}, "eot_token_id=-1, it must be a whole number from 0"),
    ({"eos_token_id": "2"}, "eos_token_id='2'"),
    ({"model": 3}, "model=3, it must be text"),
])  # fmt: skip
def test_metadata_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}"):
        tk.from_gguf(byte_level_metadata(**change), "m.gguf")


def test_scores_that_do_not_fit_are_named():
    for scores in ([0.0], [float("nan")] * 268, None):
        metadata = sentencepiece_metadata() | {"tokenizer.ggml.scores": scores}
        if scores is None:
            del metadata["tokenizer.ggml.scores"]
        with pytest.raises(ValueError, match=r"tokenizer\.ggml\.scores"):
            tk.from_gguf(metadata)


def test_llama_3_takes_a_piece_that_is_a_token_whole():
    """Its merges do not make all of its words."""
    words = byte_level_metadata()["tokenizer.ggml.tokens"]
    metadata = byte_level_metadata(tokens=[*words, "hello"], token_type=[3] * 3 + [1] * 261)
    for pre, ids in (("llama-bpe", [263]), ("gpt-2", None)):
        got = tk.from_gguf(metadata | {"tokenizer.ggml.pre": pre}).encode("hello")
        assert got == ids or (ids is None and len(got) == 4)


def folder_of_words(folder, **files):
    BYTES.backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer_config", '{"bos_tok', r"tokenizer_config\.json is no JSON"),
    ("tokenizer_config", "[]", r"tokenizer_config\.json holds a JSON list"),
    ("tokenizer_config", {"bos_token": 3}, "bos_token=3, it must be text"),
    ("tokenizer_config", {"eos_token": "<nobody>"}, "eos_token='<nobody>' is no token of tokenizer.json"),
    ("tokenizer_config", {"chat_template": ["x"]}, "chat_template=.*, it must be text or a list"),
    ("tokenizer_config", {"chat_template": [{"name": "default"}]}, "chat_template="),
    ("generation_config", "3", r"generation_config\.json holds a JSON int"),
    ("generation_config", {"eos_token_id": "2"}, "eos_token_id='2', it must be"),
    ("generation_config", {"eos_token_id": [2, 263]}, "eos_token_id=263, tokenizer.json has tokens below 263"),
])  # fmt: skip
def test_a_file_beside_the_tokenizer_that_is_damaged_is_named(tmp_path, name, content, message):
    folder_of_words(tmp_path, **{name: content})
    with pytest.raises(ValueError, match=message) as caught:
        tk.from_folder(tmp_path)
    assert name in str(caught.value)


def test_lost_merges_are_noticed(tmp_path):
    """All text would be read letter by letter."""
    folder_of_words(tmp_path)
    words = json.loads((tmp_path / "tokenizer.json").read_text())
    words["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: of 4 tokens none comes back .* merges are"
    ):
        tk.from_folder(tmp_path)


def test_ids_with_a_gap_count_up_to_the_last(tmp_path):
    """An embedding of as many rows as there are tokens would be read beyond its end."""
    folder_of_words(tmp_path)
    words = json.loads((tmp_path / "tokenizer.json").read_text())
    words["model"]["vocab"]["z"] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    assert tk.from_folder(tmp_path).vocab_size == 5001


@pytest.mark.parametrize(
    "template", ["{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{{ 'a' * 10**17 }}", "{{ " + "(" * 3000 + " }}"]
)
def test_a_template_that_fails_is_one_plain_error(template):
    metadata = byte_level_metadata() | {"tokenizer.chat_template": template}
    with pytest.raises(ValueError, match="the chat template"):
        tk.from_gguf(metadata).chat([])
