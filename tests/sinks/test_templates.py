"""What a stream is fed is what the template renders for the whole conversation, or the template is refused by name."""

from dataclasses import replace
from datetime import datetime

import pytest
from tokenizers import processors

from sinks import templates
from sinks import tokenizer_files as tk
from tests.sinks.checkpoints import byte_level_metadata
from tests.sinks.test_tokenizer import PIECES

BYTES = tk.from_gguf(byte_level_metadata())


def like_llama_3():
    """A full stop and the newlines behind it are one token, and places of tokens leave their blanks out."""
    metadata = byte_level_metadata(pre="llama3")
    for key, more in (
        ("tokens", ["ĊĊ", ".ĊĊ"]),
        ("merges", ["Ċ Ċ", ". ĊĊ"]),
        ("token_type", [1, 1]),
    ):
        metadata[f"tokenizer.ggml.{key}"] = metadata[f"tokenizer.ggml.{key}"] + more
    weights = tk.from_gguf(metadata)
    weights.backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return weights


LLAMA_3 = like_llama_3()
NOW = datetime(2026, 2, 28, 23, 59)

TRIMS = (  # content without its blanks, one BOS in front
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']\n' + m.content | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
FOLDS = (  # the system message within the first question, a BOS for each, a blank before answers, no opening, strict order
    "{% set first = messages[0].content | trim + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if first else messages) %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '{Q} ' + (first if loop.first else '') + m.content.strip() + ' {/Q}' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '(' + role + ')\n' + m.content + '(end)\n' }}{% endfor %}{% if add_generation_prompt %}{{ '(model)\n' }}{% endif %}"
)
NEVER_OPENS = (
    "{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + eos_token + '\n' }}{% endfor %}"
)
NUMBERS = (  # each turn depends on how many there were, and the first line on the day
    "{{ strftime_now('%d.%m.%Y') }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '\n#' ~ loop.index ~ ' ' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '\n=' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n=' }}{% endif %}"
)
FORGETS_THOUGHTS = (
    "{% for m in messages %}{% set text = m.content.split('</t>')[-1] if m.role == 'assistant' else m.content %}"
    "{{ '[' + m.role + ']' + text + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
WANTS_ANSWERS = (
    "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}"
    "{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}{{ '[assistant]' if add_generation_prompt else '' }}"
)
LAST_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}"
    "{{ messages[0].content + '\n' if loop.last and messages[0].role == 'system' else '' }}"
    "{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}{{ '[assistant]' if add_generation_prompt else '' }}"
)
OPENS_THOUGHTS = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]<think>' }}{% endif %}"
)
TWICE = "{% for m in messages %}{{ m.content + ' ' + m.content }}{% endfor %}{{ add_generation_prompt }}"
SHOUTS = "{% for m in messages %}{{ m.content | upper }}{% endfor %}{{ add_generation_prompt }}"
LAST_ONLY = "{{ messages[-1].content }}{{ add_generation_prompt }}"

ANSWERS = (" Yes.", " No,\nnot <b>that</b>.", " Perhaps")


WEIGHTS = {}  # by template: each compiles once


def weights(template, tokenizer=BYTES):
    key = (id(tokenizer), template)
    return WEIGHTS.setdefault(key, replace(tokenizer, chat_template=template))


def dialog(template, system="", tokenizer=BYTES):
    return templates.new_dialog(weights(template, tokenizer), system, NOW)


def fed(talk, answers=ANSWERS):
    """The stream's text as each answer begins, and the tokens fed for each."""
    text, out = "", []
    for i, answer in enumerate(answers):
        turn = talk.turn(f"Question {i}?\n  more")
        text += turn.text
        out.append((text, turn.ids))
        talk.opened(turn)
        talk.answered(answer)
        text += answer
    return out


def rendered(template, system="", answers=ANSWERS, tokenizer=BYTES):
    """The same by the template alone: the whole conversation rendered anew for each turn."""
    messages = [{"role": "system", "content": system}] if system else []
    out = []
    for i, answer in enumerate(answers):
        messages.append({"role": "user", "content": f"Question {i}?\n  more"})
        out.append(weights(template, tokenizer).chat(messages, now=NOW))
        messages.append({"role": "assistant", "content": answer})
    return out


@pytest.mark.parametrize("system", ["", "Be brief. "])
@pytest.mark.parametrize(
    "tokenizer",
    [BYTES, LLAMA_3, PIECES],
    ids=["byte level", "like llama 3", "sentencepiece"],
)
@pytest.mark.parametrize(
    "template",
    [TRIMS, FOLDS, NO_SYSTEM, NUMBERS, WANTS_ANSWERS],
    ids=["trims", "folds", "no system", "numbers", "wants answers"],
)
def test_the_stream_reads_what_the_template_renders(template, tokenizer, system):
    if template == NO_SYSTEM and system:
        with pytest.raises(ValueError, match=r"no system role\. It works without the system"):
            dialog(template, system, tokenizer)
        return
    answers = [a.strip() for a in ANSWERS] if template == TRIMS else ANSWERS
    got = fed(dialog(template, system, tokenizer), answers)
    want = rendered(template, system, answers, tokenizer)
    assert [text for text, _ in got] == want
    for (_, ids), whole in zip(got, want):
        assert tokenizer.encode(whole)[-len(ids) :] == ids
        assert whole.count("<|im_start|>" if tokenizer is not PIECES else "<s>") == (
            0 if template in (NUMBERS, WANTS_ANSWERS) else whole.count("{Q}") or 1
        )


def test_blanks_around_answers_stand_as_they_were_generated():
    text, _ = fed(dialog(TRIMS), ["\n Yes. \n", "No"])[-1]
    assert "[assistant]\n\n Yes. \n<|im_end|>[user]\nQuestion 1" in text


def test_a_template_that_never_opens_answers_opens_them_as_it_renders_them():
    got = fed(dialog(NEVER_OPENS))
    want = [text + "<assistant>\n" for text in rendered(NEVER_OPENS)]
    assert [text for text, _ in got] == want


def test_thoughts_that_a_template_leaves_out_stay_as_they_were_read():
    text, _ = fed(dialog(FORGETS_THOUGHTS), ["hm</t>Yes", "No"])[-1]
    assert text == (
        "[user]Question 0?\n  more<|im_end|>[assistant]hm</t>Yes<|im_end|>"
        "[user]Question 1?\n  more<|im_end|>[assistant]"
    )


def test_an_answer_without_a_word_is_closed_too():
    text, _ = fed(dialog(WANTS_ANSWERS), ["", "No"])[-1]
    assert "more<|im_end|>[assistant]<|im_end|>[user]Question 1" in text


def test_weights_without_a_template_read_the_papers_form_after_one_bos():
    got = [text for text, _ in fed(dialog("", "Be brief."))]
    assert got[1] == (
        "<|im_start|>Be brief.\nUSER: Question 0?\n  more\nASSISTANT: Yes.\nUSER: Question 1?\n  more\nASSISTANT:"
    )
    assert got[2].count("<|im_start|>") == 1


@pytest.mark.parametrize(
    "template, system, message",
    [
        (OPENS_THOUGHTS, "", r"once there are later ones \('<think>' becomes ''\)"),
        (LAST_SYSTEM, "Be brief.", "later ones .* It works without the system message"),
        (TWICE, "", "shows an answer 2 times"),
        (SHOUTS, "", "shows an answer 0 times"),
        (LAST_ONLY, "", "shows an answer 0 times"),
        ("{{ messages[0].content + 1 }}", "", r"fails on this conversation.*can only concatenate"),
        ("{% for tool in tools %}{% endfor %}", "", "'NoneType' object is not iterable"),
    ],
)
def test_a_template_that_does_not_fit_a_stream_is_refused_at_once(template, system, message):
    with pytest.raises(ValueError, match=message):
        dialog(template, system)
    if template == LAST_SYSTEM:
        assert [text for text, _ in fed(dialog(template))] == rendered(template)


@pytest.mark.parametrize("text", ["Answer0Q", "{{ bos_token }}", "a\n\nb", "<|im_end|>"])
def test_messages_may_say_anything(text):
    talk = dialog(TRIMS)
    for answer in (text, text):
        turn = talk.turn(text)
        talk.opened(turn)
        talk.answered(answer)
    assert talk.turn("x").text == "<|im_end|>[user]\nx<|im_end|>[assistant]\n"


def test_the_clock_stands_still_in_a_conversation(monkeypatch):
    """A date that changed at midnight would change what was read."""
    talk = dialog(NUMBERS)
    assert fed(talk)[0][0].startswith("28.02.2026")
    kept = templates.restore(talk.tokenizer, talk.state())
    assert kept.turn("Late?").text == talk.turn("Late?").text == "\n#7 Late?\n="


def test_the_token_that_closes_answers_ends_them():
    """Also where the weights' files name another one."""
    names_another = replace(BYTES, eos_ids=(0,))
    closes = TRIMS.replace("eos_token", "'<|im_end|>'")
    assert dialog(closes, tokenizer=names_another).closing == (2,)
    assert dialog(NO_SYSTEM).closing == ()


@pytest.mark.parametrize(
    "template", [TRIMS, FOLDS, NEVER_OPENS], ids=["trims", "folds", "never opens"]
)
@pytest.mark.parametrize(
    "tokenizer",
    [BYTES, LLAMA_3, PIECES],
    ids=["byte level", "like llama 3", "sentencepiece"],
)
def test_a_message_whose_reading_was_stopped_goes_on_with_the_next(template, tokenizer):
    """Wherever it was stopped, the stream is that of a conversation: of the two messages as one, or of the second."""
    message = "the café 12 😀.\n\nthe end"
    for first in (False, True):
        begun = dialog(template, "Be brief.", tokenizer)
        before = "" if first else fed(begun, [" Yes."])[0][0] + " Yes."
        turn = begun.turn(message)
        for count in range(1, 60, 2):
            talk, other = (
                templates.restore(begun.tokenizer, begun.state()),
                templates.restore(begun.tokenizer, begun.state()),
            )
            n, end = talk.stops_at(turn, count)
            assert n >= min(count, len(turn.ids))
            if n == len(turn.ids):
                break
            talk.stopped(turn, end)
            second = talk.turn("Go on")
            whole = before + turn.text[:end] + second.text[end:]
            content = f"{talk.draft}\n\nGo on" if talk.draft else "Go on"
            assert talk.draft == message[: len(talk.draft)]
            assert whole == before + other.turn(content).text
            assert turn.ids[:n] + second.ids == other.turn(content).ids
        else:
            pytest.fail("the message never ended")


def test_a_state_of_another_template_is_refused():
    with pytest.raises(ValueError, match="another chat template"):
        templates.restore(replace(BYTES, chat_template=FOLDS), dialog(TRIMS).state())
