"""Tasks ask what they say, and an answer counts exactly when greedy decoding would give it."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinks import stream, tasks, tokenizer_files
from sinks.cache import CacheSpec, init
from tests.sinks import small
from tests.sinks.checkpoints import byte_level_metadata

TOKENIZER = tokenizer_files.from_gguf(byte_level_metadata())


@pytest.mark.parametrize("keys", ["lines", "names"])
@pytest.mark.parametrize("distances", [(3,), (2, 5, 4)])
def test_streameval_asks_for_lines_that_were_there(distances, keys):
    maker = tasks.StreamEval(queries=9, every=3, distances=distances, digits=4, keys=keys)
    text, answers = maker.task(0)
    assert maker.task(0) == (text, answers) != maker.task(1)
    pattern = r"Question: .* content (.*)\?\nAnswer: The .* content (.*) is <(\d{4})>"
    asked = list(re.finditer(pattern, text))
    assert len(asked) == len(answers) == 9
    for i, (match, answer) in enumerate(zip(asked, answers)):
        lines = r"^The register content (.*) is <(\d+)>\.$"
        before = re.findall(lines, text[: match.start()], re.M)
        line, again, value = match.groups()
        assert line == again and dict(before)[line] == value == text[answer.start : answer.stop]
        assert answer.kind == distances[i % len(distances)]
        back = len(before) - 1 - [key for key, _ in before].index(line)
        assert back == answer.kind if len(distances) == 1 else 0 <= back - answer.kind <= 2
    assert (
        len({match[1] for match in asked}) == 9
    )  # none twice: the first answer would give it away


@pytest.mark.parametrize("bos", [True, False])
def test_places_of_answers_survive_tokenization(bos):
    task = tasks.StreamEval(queries=3, every=2, distances=(1,)).task(0)
    task = tasks.Task(
        "é😀" + task.text,
        tuple(a._replace(start=a.start + 2, stop=a.stop + 2) for a in task.answers),
    )
    ids, answers = tasks.tokenize(TOKENIZER, task, bos=bos)
    assert TOKENIZER.decode(ids[int(bos) :]) == task.text
    for there, here in zip(task.answers, answers):
        assert TOKENIZER.decode(ids[here.start : here.stop]) == task.text[there.start : there.stop]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [4, 64])
def test_hits_are_those_of_token_by_token_decoding(chunk):
    """Rows of different lengths, longer than the cache; texts that a greedy model half follows."""
    config, spec = small.config(), CacheSpec(sinks=2, recent=6)
    params = small.params(config)
    rng = np.random.default_rng(0)
    step = jax.jit(stream.hidden, static_argnums=0)
    texts, wants = [], []
    for length in (23, 9, 17):
        cache, row, want = init(config, spec, 1, stacked=True), [int(rng.integers(17))], [False]
        while len(row) < length:
            x, cache = step(config, params, cache, jnp.asarray([row[-1:]]))
            likeliest = int(stream.unembed(config, params, x)[0, 0].argmax())
            row.append(likeliest if rng.random() < 0.6 else int(rng.integers(17)))
            want.append(row[-1] == likeliest)
        texts.append(np.array(row))
        wants.append(want)
    got = tasks.greedy_hits(config, params, spec, texts, chunk=chunk)
    for hits, want in zip(got, wants):
        assert hits.tolist() == want and 0.3 < np.mean(want) < 1


def test_an_answer_is_right_when_all_of_it_is():
    hits = np.array([False, True, True, False, True])
    answers = [tasks.Answer(1, 3, 0), tasks.Answer(2, 4, 0), tasks.Answer(4, 5, 0)]
    assert tasks.exact_matches(hits, answers).tolist() == [True, False, True]


def test_embedded_questions_can_be_answered():
    questions = tasks.read_questions("embedded")
    assert len(questions) > 100 and len({q.text for q in questions}) == len(questions)
    for question in questions:
        assert question.answer in question.choices and len(question.choices) > 2
        assert len(set(question.choices)) == len(question.choices)


def test_a_stream_asks_every_question_before_one_comes_again():
    questions = tasks.read_questions("embedded")[:5]
    text, answers = tasks.qa_stream(questions, 12, seed=0)
    asked = re.findall(r"Question: (.*)\nChoices: (.*)\nAnswer: (.*)\n", text)
    assert [a.kind for a in answers] == [0] * 5 + [1] * 5 + [2] * 2
    known = {q.text: q for q in questions}
    assert {q for q, *_ in asked[:5]} == {q for q, *_ in asked[5:10]} == set(known)
    for (question, choices, answer), place in zip(asked, answers):
        assert text[place.start : place.stop] == f" {answer}"
        assert answer == known[question].answer
        assert sorted(choices.split(", ")) == sorted(known[question].choices)
    alone = tasks.qa_alone(questions, 5, seed=0)
    for task in alone:
        (answer,) = task.answers
        assert task.text.count("Question") == 2 and answer.start > task.text.rindex("Question")


def test_questions_from_files(tmp_path):
    ours = {"question": "a?", "choices": ["x", "y"], "answer": 1}
    choices = [{"text": "p", "label": "A"}, {"text": "q", "label": "B"}]
    arc = {"id": "1", "question": {"stem": "b?", "choices": choices}, "answerKey": "B"}
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(ours) + "\n" + json.dumps(arc) + "\n")
    assert tasks.read_questions(str(file)) == [
        tasks.Question("a?", ("x", "y"), "y"),
        tasks.Question("b?", ("p", "q"), "q"),
    ]
    for bad in (
        "{",
        '{"question": "c?"}',
        '{"question": "c?", "choices": ["x"], "answer": "z"}',
        "[]",
    ):
        file.write_text(json.dumps(ours) + "\n" + bad + "\n")
        with pytest.raises(ValueError, match=r"q\.jsonl:2 is no question"):
            tasks.read_questions(str(file))
    with pytest.raises(ValueError, match=r"no such file\. 'embedded' is always there"):
        tasks.read_questions(str(tmp_path / "none"))


def test_settings_that_ask_nothing_are_refused():
    with pytest.raises(ValueError, match="queries=0: at least 1"):
        tasks.StreamEval(queries=0)
    with pytest.raises(ValueError, match="keys='words': 'lines' or 'names'"):
        tasks.StreamEval(keys="words")
    with pytest.raises(ValueError, match="1020 lines need as many names, there are 720"):
        tasks.StreamEval(keys="names")
    with pytest.raises(ValueError, match=r"distances=\(0,\)"):
        tasks.StreamEval(distances=(0,))
