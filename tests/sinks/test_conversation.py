"""A conversation feeds what its template renders, can be stopped anywhere, and is saved whole or not at all."""

import errno
from dataclasses import replace

import jax
import numpy as np
import pytest

import sinks
from common import checkpoint
from sinks import params, stream
from sinks.cache import CacheSpec
from sinks.chat import Conversation
from sinks.sampling import Sampling
from tests.sinks.checkpoints import LLAMA, byte_level_folder, save, tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*perplexity", "ignore:.*reach position")

TRIMS = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' + m.content | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loaded = sinks.load(byte_level_folder(tmp_path_factory.mktemp("model") / "model"))
    return loaded._replace(
        params=stream.prepare(loaded.params, stacked=True),
        tokenizer=replace(loaded.tokenizer, chat_template=TRIMS),
    )


def conversation(model, seed=0, sampling=Sampling(1.0), **changes):
    spec = CacheSpec(2, 30, **changes)
    return Conversation(model, spec, sampling, jax.random.key(seed), name="the model")


@pytest.fixture
def fed(monkeypatch):
    """Every token that the model reads from here on."""
    tokens, extend, decode = [], stream.extend, stream.decode_step

    def recording_extend(config, params, cache, rows, **settings):
        tokens.extend(rows[0])
        return extend(config, params, cache, rows, **settings)

    def recording_decode(config, params, cache, token_B, *rest):
        tokens.extend(np.asarray(token_B).tolist())
        return decode(config, params, cache, token_B, *rest)

    monkeypatch.setattr(stream, "extend", recording_extend)
    monkeypatch.setattr(stream, "decode_step", recording_decode)
    return tokens


def test_the_model_reads_the_conversation_and_nothing_else(model, fed):
    """For a template that trims: one BOS, every answer closed once, nobody's words but the user's and the model's."""
    often = replace(model.tokenizer, eos_ids=(2, *range(100, 263)))  # so that answers end
    model = model._replace(tokenizer=often)
    talk, messages, limits = conversation(model), [], (1, 400, 1)
    for message, limit in zip(("Hi", " Go on\n", "Bye"), limits):
        answer = "".join(talk.answer(message, limit=limit))
        messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
    del messages[-1]
    text = model.tokenizer.decode(fed)
    assert text.count("<|im_start|>") == 1 and text.startswith("<|im_start|>[user]Hi<|im_end|>")
    opened = text.rindex("[assistant]") + len("[assistant]")
    trimmed = [m | {"content": m["content"].strip()} for m in messages]
    want = "<|im_start|>" + "".join(f"[{m['role']}]{m['content']}<|im_end|>" for m in trimmed)
    without_blanks = lambda text: "".join(text.split())  # noqa: E731
    assert without_blanks(text[:opened]) == without_blanks(f"{want}[assistant]")
    assert talk.length == len(fed)


def test_a_reading_is_stopped_at_the_next_chunk_and_goes_on_with_the_next_message(model, fed):
    talk = conversation(model)
    assert list(talk.answer("0123456789" * 40, stop=lambda: len(fed) > 100)) == []
    assert talk.reading == (128, 419) and talk.length == 128 == len(fed)
    assert "".join(talk.answer("Never mind", limit=3))
    text = model.tokenizer.decode(fed)
    part = ("0123456789" * 40)[: 128 - len("_[user]")]
    assert text.startswith(f"<|im_start|>[user]{part}\n\nNever mind<|im_end|>[assistant]")


def test_a_stop_before_anything_is_read_changes_nothing(model, fed):
    talk = conversation(model)
    assert list(talk.answer("Hi", stop=lambda: True)) == []
    assert talk.length == 0 == len(fed) and not talk.unsaved
    with pytest.raises(ValueError, match="refuses"):
        refusing = (
            model.tokenizer.chat_template
            + "{% if 'x' in messages[-1].content %}{{ raise_exception('x') }}{% endif %}"
        )
        other = replace(model.tokenizer, chat_template=refusing)
        talk = conversation(model._replace(tokenizer=other))
        list(talk.answer("x"))
    assert talk.length == 0


def test_a_stop_after_the_message_leaves_an_empty_answer(model, fed):
    talk = conversation(model)
    assert list(talk.answer("Hi", stop=lambda: len(fed) > 0)) == []
    list(talk.answer("Again", limit=1))
    text = model.tokenizer.decode(fed)
    assert "[user]Hi<|im_end|>[assistant]<|im_end|>[user]Again" in text


@pytest.mark.slow
def test_a_saved_stream_goes_on_as_if_never_left(model, tmp_path):
    """With its own sampling and key, whatever the session that loads it was started with."""
    talk, other = conversation(model), conversation(model, seed=1, sampling=Sampling())
    list(talk.answer("Once upon a time", limit=7))
    talk.save(str(tmp_path / "a b" / "talk"))
    assert not talk.unsaved
    other.load(str(tmp_path / "a b" / "talk"))
    assert list(other.answer("And?", limit=7)) == list(talk.answer("And?", limit=7))
    assert other.sampling == Sampling(1.0)


def test_a_stopped_reading_is_saved_too(model, tmp_path, fed):
    talk, other = conversation(model), conversation(model)
    list(talk.answer("0123456789" * 10, stop=lambda: len(fed) > 0))
    talk.save(str(tmp_path / "talk"))
    other.load(str(tmp_path / "talk"))
    assert list(other.answer("So?", limit=4)) == list(talk.answer("So?", limit=4))


def test_a_stream_is_continued_in_another_layout(model, tmp_path):
    """As another backend lays out its layers, and back."""
    loaded = sinks.load(byte_level_folder(tmp_path / "model"), check=False)
    unstacked = model._replace(params=stream.prepare(loaded.params, stacked=False))
    talk, other, back = conversation(model), conversation(unstacked), conversation(model)
    list(talk.answer("Hi", limit=3))
    talk.save(str(tmp_path / "talk"))
    other.load(str(tmp_path / "talk"))
    other.save(str(tmp_path / "other"))
    back.load(str(tmp_path / "other"))
    assert isinstance(other.cache.ring, tuple)
    jax.tree.map(np.testing.assert_array_equal, back.cache, talk.cache)


@pytest.mark.slow
def test_a_stream_of_another_cache_or_model_names_the_command_that_opens_it(model, tmp_path):
    talk = conversation(model)
    talk.save(str(tmp_path / "talk"))
    flags = "--model='the model' --sinks=2 --recent=30"
    for spec in (CacheSpec(2, 31), CacheSpec(2, 30, int8=True), CacheSpec(3, 30)):
        with pytest.raises(ValueError) as error:
            Conversation(model, spec, Sampling(), jax.random.key(0)).load(str(tmp_path / "talk"))
        assert str(error.value) == (
            f"{tmp_path}/talk was saved with {flags}: start `python -m sinks.chat {flags}`, then /load {tmp_path}/talk"
        )
    larger = model._replace(config=replace(model.config, rope_theta=7.0))
    with pytest.raises(ValueError, match="was saved with --model='the model'"):
        conversation(larger).load(str(tmp_path / "talk"))
    conversation(model, int8=True).save(str(tmp_path / "in 8 bits"))
    with pytest.raises(
        ValueError, match="saved with --model='the model' --sinks=2 --recent=30 --int8:"
    ):
        talk.load(str(tmp_path / "in 8 bits"))
    with pytest.raises(ValueError, match="no folder that /save made"):
        talk.load(str(tmp_path / "nothing"))


def test_a_stream_of_other_weights_is_refused_and_of_the_same_in_another_type_is_not(tmp_path):
    folder = byte_level_folder(tmp_path / "model")
    as_loaded = {t: sinks.load(folder, dtype=t, check=False) for t in ("float32", "bfloat16")}
    there = tensors(LLAMA)
    there["model.layers.1.self_attn.q_proj.weight"] += 0.5
    save(folder, LLAMA, there)
    as_loaded["tuned"] = sinks.load(folder, check=False)

    def talk(kind, spec=CacheSpec(2, 30)):
        loaded = as_loaded[kind]
        ready = loaded._replace(params=stream.prepare(loaded.params, int8=kind == "float32"))
        mark = params.fingerprint(loaded.params)
        return Conversation(ready, spec, Sampling(), jax.random.key(0), name="A", weights=mark)

    talk("float32").save(str(tmp_path / "talk"))
    talk("bfloat16").load(str(tmp_path / "talk"))
    with pytest.raises(ValueError, match=r"talk was saved with other weights .* \(A\): start"):
        talk("tuned").load(str(tmp_path / "talk"))


def test_a_link_is_followed_and_an_address_is_no_folder(model, tmp_path):
    talk, other = conversation(model), conversation(model)
    talk.save(str(tmp_path / "talk"))
    (tmp_path / "link").symlink_to("talk")
    list(talk.answer("Hi", limit=3))
    talk.save(str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"talk", "link"}
    other.load(str(tmp_path / "talk"))
    assert other.length == talk.length > 0
    with pytest.raises(ValueError, match="folder=gs://bucket/x: not a path of a file system"):
        talk.save("gs://bucket/x")


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_that_fails_is_one_line_and_leaves_all_as_it_was(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    talk, other = conversation(model), conversation(model)
    list(talk.answer("Hi", limit=3))
    talk.save(str(tmp_path / "talk"))
    list(talk.answer("More", limit=3))
    for place in (tmp_path / "file" / "x", "/proc/x/y", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=r"cannot be written .* save it elsewhere") as error:
            talk.save(str(place))
        assert "\n" not in str(error.value)
    for place in (tmp_path / "file", tmp_path / "folder", "/", "."):
        with pytest.raises(ValueError, match="is there already: choose a new name"):
            talk.save(str(place))
    with pytest.raises(ValueError, match="home"):
        talk.save("~nobody_of_that_name/x")
    monkeypatch.setattr(checkpoint.Checkpointer, "save", full_disk)
    with pytest.raises(ValueError, match="No space left"):
        talk.save(str(tmp_path / "talk"))
    monkeypatch.undo()
    assert talk.unsaved and {p.name for p in tmp_path.iterdir()} == {"file", "folder", "talk"}
    other.load(str(tmp_path / "talk"))
    assert 0 < other.length < talk.length
    talk.save(str(tmp_path / "talk"))  # its own earlier state is replaced
    with pytest.raises(ValueError, match="choose a new name"):  # but not what it did not come from
        other.save(str(tmp_path / "talk"))
    other.load(str(tmp_path / "talk"))
    assert other.length == talk.length and {p.name for p in tmp_path.iterdir()} == {
        "file", "folder", "talk"
    }  # fmt: skip
