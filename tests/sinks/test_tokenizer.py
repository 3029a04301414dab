"""Text survives the round trip and appears token by token; chat templates come from the weights and are not trusted."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinks import tokenizer as tk
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
    with pytest.raises(ValueError, match="cannot be read"):
        chat("{% if %}")
    with pytest.raises(ValueError, match="without a chat template"):
        chat("")
    assert chat("{{ bos_token }}{{ messages[0] | tojson }}") == (
        '<|im_start|>{"role": "user", "content": "a"}'
    )


def test_what_cannot_be_rebuilt_is_named():
    with pytest.raises(ValueError, match=r"pre='tekken': gpt-2, smollm.* tokenizer\.json beside"):
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
