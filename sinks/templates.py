"""Messages to the tokens that a stream has yet to read, by the weights' own chat template.

A stream cannot take back what it has read. So turn n is fed exactly what the template renders for the whole conversation
so far, beyond what it rendered before; the model's answers stand in the stream as they were generated. Where the new text
begins is found by rendering the conversation with a mark in the last answer's place: all before the mark must be what was
read before, all after it is new, such as "<|im_end|>", the message, and the opening of the next answer.

A template that does not allow this is refused, before anything is read: one that renders earlier turns differently once
there are later ones (a system message that moves to the last turn, a "<think>" that opens an answer and is gone from it
later), or that does not show an answer exactly once.

What the template leaves out of an earlier answer, such as its reasoning, stays in the stream: it was read.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from sinks.tokenizer import Tokenizer

Message = dict[str, str]

REMEDY = "Use weights with another chat template"
NO_ANSWER = "(no answer)"  # stands for an empty answer that a template refuses; never fed


class Turn(NamedTuple):
    """What one message adds to the stream.

    Attributes:
      content: the user's message, with the part of it that was read before.
      text: what the template renders beyond the last answer.
      ids: tokens of what of it was not read before.
      places: where each of them lies in `text`: first character and end.
      until: characters that the template renders for the whole conversation, up to the answer that `text` opens.
      digest: their checksum.
    """

    content: str
    text: str
    ids: list[int]
    places: list[tuple[int, int]]
    until: int
    digest: str


@dataclass
class Dialog:
    """A conversation as its template sees it. Made by `new_dialog`, which refuses templates that do not fit a stream.

    Its text grows with the conversation, by a few bytes a token, since a template may look at all of it.

    Attributes:
      now: what the template's clock shows, for the whole conversation: a date that changed would change what was read.
      messages: the finished turns, and the user's message while it is being answered.
      until, digest: what the template rendered up to the last answer's beginning.
      held: what was read of a turn whose reading was stopped; draft: the part of the user's message in it.
      closing: tokens that the template ends an answer with, besides the tokenizer's `eos_ids`.
      silent: the template does not open answers when it is asked to.
    """

    tokenizer: Tokenizer
    now: datetime = field(default_factory=datetime.now)
    messages: list[Message] = field(default_factory=list)
    until: int = 0
    digest: str = field(default_factory=lambda: _digest(""))
    held: str = ""
    draft: str = ""
    closing: tuple[int, ...] = ()
    silent: bool = False

    def turn(self, message: str) -> Turn:
        """What `message` adds. Nothing has changed before `opened` or `stopped` say what was read of it.

        Raises:
          ValueError: the template refuses the message, or renders what was read before otherwise.
        """
        content = f"{self.draft}\n\n{message}" if self.draft else message
        messages = [*self.messages, _user(content)]
        whole, text = self._render(messages)
        opening = self._opening(messages, whole)
        whole, text = whole + opening, text + opening
        if not text.startswith(self.held):
            raise ValueError(
                "the chat template renders this message otherwise than the part of it that was read before: start a new one"
            )
        ids, places = self._tokens(text, len(self.held))
        return Turn(content, text, ids, places, len(whole), _digest(whole))

    def opened(self, turn: Turn) -> None:
        """All of the turn was read: an answer follows."""
        self.messages.append(_user(turn.content))
        self.until, self.digest, self.held, self.draft = turn.until, turn.digest, "", ""

    def answered(self, text: str) -> None:
        """The answer ended, or was stopped, and `text` is what there is of it."""
        self.messages.append({"role": "assistant", "content": text})
        if not text.strip() and not self._takes_last_answer():
            self.messages[-1]["content"] = NO_ANSWER

    def stops_at(self, turn: Turn, count: int) -> tuple[int, int]:
        """The place where the reading of a turn can stop once `count` of its tokens were read: after these or a few more.

        Returns the tokens, and the characters of `turn.text` that they are: all of it behind the message's end, or where the
        template changes the message. Never within a character.
        """
        first, last = self._message_in(turn)
        for n in range(max(count, 1), len(turn.ids)):
            ends = (turn.places[n - 1][1], turn.places[n][0])  # some tokenizers leave blanks out
            if max(ends) >= last:
                break
            for end in ends:
                is_shown = turn.text[first:end] in turn.content
                if is_shown and self._tokens(turn.text[:end], len(self.held))[0] == turn.ids[:n]:
                    return n, end
        return len(turn.ids), len(turn.text)

    def stopped(self, turn: Turn, end: int) -> None:
        """`end` characters of the turn's text were read, no more will be: the next message goes on from there."""
        first, _ = self._message_in(turn)
        self.held, self.draft = turn.text[:end], turn.text[first:end]

    def state(self) -> dict[str, Any]:
        """Everything as JSON, for `restore`."""
        return {
            "template": _digest(self.tokenizer.chat_template),
            "now": self.now.isoformat(),
            "messages": [dict(message) for message in self.messages],
            "until": self.until,
            "digest": self.digest,
            "held": self.held,
            "draft": self.draft,
            "closing": self.closing,
            "silent": self.silent,
        }

    @property
    def _answered(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def _tokens(self, text: str, start: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of text[start:] where it follows the last answer and text[:start], and where each lies in `text`.

        Some tokenizers write a text's first word otherwise: so it is cut out of the whole, unless a token spans the cut.
        """
        known = (_mark(self.messages) if self._answered else "") + text[:start]
        before = self.tokenizer.encode(known)
        ids, places = self.tokenizer.encode_with_places(known + text[start:])
        if ids[: len(before)] == before:
            ids, places, shift = ids[len(before) :], places[len(before) :], start - len(known)
        else:
            ids, places = self.tokenizer.encode_with_places(text[start:])
            shift = start
        return ids, [(first + shift, end + shift) for first, end in places]

    def _render(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The template's text of all `messages`, and the part of it behind the last answer."""
        whole = _template(self.tokenizer, messages, self.now, True)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not answers:
            return whole, whole
        marked, mark = list(messages), _mark(messages)
        marked[answers[-1]] = {"role": "assistant", "content": mark}
        shown = _template(self.tokenizer, marked, self.now, True)
        if shown.count(mark) != 1:
            raise ValueError(
                f"the chat template shows an answer {shown.count(mark)} times instead of once as it is: {REMEDY}"
            )
        before, _, text = shown.partition(mark)
        for version in (before, whole):
            if _digest(version[: self.until]) != self.digest:
                raise ValueError(self._what_changed(messages, version))
        if not whole.endswith(text) or len(whole) < self.until + len(text):
            raise ValueError(
                f"the chat template renders what follows this answer otherwise than after others: {REMEDY}"
            )
        return whole, text

    def _what_changed(self, messages: Sequence[Message], now_whole: str) -> str:
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        was = _template(self.tokenizer, messages[:last], self.now, True)
        pairs = enumerate(zip(was, now_whole))
        same = next((i for i, (a, b) in pairs if a != b), min(len(was), len(now_whole)))
        return (
            f"the chat template renders a turn otherwise once there are later ones ({was[same : same + 30]!r} becomes "
            f"{now_whole[same : same + 30]!r}), and a stream cannot take back what it has read: {REMEDY}"
        )

    def _opening(self, messages: Sequence[Message], whole: str) -> str:
        """What opens the answer where the template ignores that it is asked to: what it renders before answers."""
        if not self.silent:
            return ""
        mark = _mark(messages)
        answered = [*messages, {"role": "assistant", "content": mark}]
        before, found, _ = _template(self.tokenizer, answered, self.now, False).partition(mark)
        if not found or not before.startswith(whole):
            raise ValueError(
                f"the chat template renders a question otherwise once it is answered: {REMEDY}"
            )
        opening = before[len(whole) :]
        return opening.rstrip(" ") if opening.strip() else ""  # a blank belongs to the first word

    def _takes_last_answer(self) -> bool:
        try:
            self._render([*self.messages, _user("And?")])
        except ValueError:
            return False
        return True

    def _message_in(self, turn: Turn) -> tuple[int, int]:
        """Where the user's message lies in `turn.text`; nowhere, (0, 0), where the template changes it."""
        mark = _mark(self.messages) + "u"
        messages = [*self.messages, _user(mark)]
        whole, shown = self._render(messages)
        shown += self._opening(messages, whole)
        before, _, after = shown.partition(mark)
        end = len(turn.text) - len(after)
        fits = turn.text.startswith(before) and turn.text.endswith(after) and end >= len(before)
        return (len(before), end) if fits and shown.count(mark) == 1 else (0, 0)


def _mark(messages: Sequence[Message]) -> str:
    """A word that is nowhere in the conversation, and that no template has a reason to alter."""
    number = 0
    while any(f"Answer{number}Q" in message["content"] for message in messages):
        number += 1
    return f"Answer{number}Q"


def new_dialog(tokenizer: Tokenizer, system: str = "", now: datetime | None = None) -> Dialog:
    """An empty conversation, with the system message where there is one.

    Raises:
      ValueError: the template does not render a conversation of a few turns as the continuation of its beginning.
    """
    now = now or datetime.now()
    try:
        return _try_out(tokenizer, system, now)
    except ValueError as error:
        if not system:
            raise
        try:
            _try_out(tokenizer, "", now)
        except ValueError:
            raise error from None
        raise ValueError(f"{error}. It works without the system message") from error


def restore(tokenizer: Tokenizer, state: dict[str, Any]) -> Dialog:
    """The conversation of `Dialog.state`. Raises ValueError where it was held by another template."""
    state = dict(state)
    if state.pop("template") != _digest(tokenizer.chat_template):
        raise ValueError("it was held with another chat template")
    now, closing = datetime.fromisoformat(state.pop("now")), tuple(state.pop("closing"))
    return Dialog(tokenizer, now, closing=closing, **state)


def _try_out(tokenizer: Tokenizer, system: str, now: datetime) -> Dialog:
    """Three turns, of which nothing is fed; and what they tell of the template, as the dialog that can now begin."""
    first = [*_system(system), _user("Hello.")]
    asked, unasked = (_template(tokenizer, first, now, answer) for answer in (True, False))
    trial, closing = Dialog(tokenizer, now, _system(system), silent=asked == unasked), ()
    for question, answer in (("Hello.", "Yes."), ("Go on.", "No."), ("And then?", "So.")):
        turn = trial.turn(question)
        if trial.until:
            closing = _first_special(tokenizer, turn.ids)
        trial.opened(turn)
        trial.answered(answer)
    return Dialog(tokenizer, now, _system(system), closing=closing, silent=trial.silent)


def _first_special(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[int, ...]:
    added = tokenizer.backend.get_added_tokens_decoder()
    for token in ids:
        if token in added and added[token].special:
            return (token,)
        if tokenizer.decode([token]).strip():
            break
    return ()


def _template(
    tokenizer: Tokenizer, messages: Sequence[Message], now: datetime, answer: bool
) -> str:
    if not tokenizer.chat_template:
        return _plain(tokenizer, messages, answer)
    try:
        return tokenizer.chat(messages, answer=answer, now=now)
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"the chat template fails on this conversation: {error}") from error


def _plain(tokenizer: Tokenizer, messages: Sequence[Message], answer: bool) -> str:
    """What weights without a template read: the paper's own form, after one BOS where there is one."""
    names = {"system": "", "user": "USER: ", "assistant": "ASSISTANT:"}
    lines = [names[message["role"]] + message["content"] for message in messages]
    bos = "" if tokenizer.bos_id is None else tokenizer.backend.id_to_token(tokenizer.bos_id) or ""
    return bos + "\n".join([*lines, "ASSISTANT:"] if answer else lines)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _system(content: str) -> list[Message]:
    return [{"role": "system", "content": content}] if content else []
