"""Conversations: turns through the template, stopping, saving, and the memory that stays."""

import io
import sys
import threading
from dataclasses import replace

import jax
import pytest

import sinks
from sinks import chat, stream
from sinks.cache import CacheSpec
from sinks.sampling import Sampling
from tests.sinks.checkpoints import byte_level_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*perplexity", "ignore:.*reach position")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loaded = sinks.load(byte_level_folder(tmp_path_factory.mktemp("model") / "model"))
    return loaded._replace(params=stream.prepare(loaded.params, stacked=True))


def conversation(model, **spec):
    return chat.Conversation(model, CacheSpec(2, 30, **spec), Sampling(1.0), jax.random.key(0))


@pytest.mark.slow
def test_a_conversation_outlives_its_cache(model):
    talk = conversation(model)
    held = jax.tree.map(lambda x: x.shape, talk.cache)
    for i in range(3):
        assert isinstance("".join(talk.answer(f"Question {i}?", limit=20)), str)
    assert talk.length > 2 * talk.spec.capacity
    assert talk.forgotten == talk.length - 32
    assert jax.tree.map(lambda x: x.shape, talk.cache) == held


@pytest.mark.slow
def test_turns_are_forgotten_whole(model):
    """With room reserved, what is remembered begins where a turn began; without, it is cut anywhere."""
    talk = chat.Conversation(model, CacheSpec(2, 60), Sampling(1.0), jax.random.key(0), reserve=6)
    begins = []
    for i in range(6):
        begins.append(talk.length)
        list(talk.answer(f"Question {i}?", limit=5))
        assert talk.forgotten == 0 or talk.forgotten + talk.spec.sinks in begins
    assert talk.forgotten > 0
    assert len(talk._turns) <= 4  # those remembered, not all


def test_a_stopped_answer_is_continued_as_it_was_shown(model):
    """Stopping after five pieces gives the stream of an answer whose limit is five."""
    stopped, limited = conversation(model), conversation(model)
    answer = stopped.answer("Hello")
    shown = "".join(next(answer) for _ in range(5))
    answer.close()
    pieces = list(limited.answer("Hello", limit=5))
    assert shown == "".join(pieces[:5])
    assert stopped.length == limited.length
    after = [list(talk.answer("And?", limit=5)) for talk in (stopped, limited)]
    assert after[0] == after[1]


def test_a_message_that_the_template_refuses_offers_a_new_stream(model, capsys):
    """Only where something was said: all that comes after it may be refused."""
    refuses = "{% if 'no' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = model.tokenizer
    picky = replace(tokenizer, chat_template=refuses + tokenizer.chat_template)
    talk, lines = conversation(model._replace(tokenizer=picky)), iter(["no", "Hi", "no", "/quit"])
    chat._converse(talk, 2, lambda _: next(lines, ""), threading.Event())
    first, second = capsys.readouterr().err.splitlines()
    assert "refuses" in first and "/new" not in first
    assert second.endswith("; /new begins a new stream")


@pytest.mark.slow
def test_the_program_from_start_to_quit(model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sinks, "load", lambda name, dtype: model)
    lines = [
        "Hi",
        "/save",
        f"/save {tmp_path / 'x'}",
        "/new",
        f"/load {tmp_path / 'x'}",
        "/oops",
        "/quit",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    try:
        assert chat.main(["--recent=30", "--limit=4"]) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    out, err = capsys.readouterr()
    assert "tokens/s, cache" in out and "forgotten" in out and "a new stream" in out
    assert "/save needs a folder" in err and "/oops is no command" in err
