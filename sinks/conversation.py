"""One stream of turns: messages read, answers drawn, the state saved and continued.

The model's memory is the cache, of a size that stays. The conversation's text is kept with it, since a chat template may
look at all of it (sinks/templates.py).
"""

import os
import secrets
import shlex
import shutil
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from common.checkpoint import Checkpointer, DamagedError, read_meta, restore_params
from common.full_disk import is_full
from common.paths import check_local
from sinks import cache, stream, templates
from sinks.cache import CacheSpec
from sinks.loading import Model
from sinks.policies import evict_before
from sinks.sampling import Sampling
from sinks.templates import Turn
from sinks.tokenizer import TextStream

PROMPT_CHUNK = 64  # tokens of a prompt at a time; between two of them the reading can be stopped
FORMAT = 2  # of what `save` writes


@dataclass
class Conversation:
    """One stream of turns.

    Attributes:
      model: with parameters from `stream.prepare`.
      key: draws the answers; with the same key, messages and settings they are the same.
      reserve: tokens of room made for each answer by forgetting whole turns, so that none is remembered without its
        beginning while there is a choice; 0: token by token, as in the paper.
      name: where the model is from, for the command that opens what was saved.
      weights: `params.fingerprint` of the parameters as they were loaded; a stream that was saved with another is not
        loaded. None: not compared.
      reading: tokens of the last message that were read, and all of them.
      saved: the stream's length when it was saved or loaded.

    Raises:
      ValueError: the chat template does not fit a stream (sinks/templates.py), or refuses the system message.
    """

    model: Model
    spec: CacheSpec
    sampling: Sampling
    key: jax.Array
    system: str = ""
    reserve: int = 0
    name: str = ""
    weights: int | None = None

    def __post_init__(self):
        if self.reserve < 0:
            raise ValueError(f"reserve={self.reserve}: 0 (off) or more")
        stream.check_spec(self.model.config, self.spec)
        self.new()

    def new(self) -> None:
        """Forgets everything."""
        self.dialog = templates.new_dialog(self.model.tokenizer, self.system)
        self._unread: list[int] = []  # shown, but not yet fed to the model
        self._turns: list[int] = []  # where the remembered turns begin
        self._stamps: set[str] = set()  # of the saved states that this stream has gone through
        self.reading, self.saved = (0, 0), 0
        self.cache = cache.init(self.model.config, self.spec, stacked=self._stacked)

    @property
    def length(self) -> int:
        """Tokens of the stream so far."""
        return int(self.cache.length[0])

    @property
    def forgotten(self) -> int:
        """Tokens that have left the cache."""
        return max(int(self.cache.evicted[0]), self.length - self.spec.capacity, 0)

    @property
    def unsaved(self) -> int:
        """Tokens that `save` has not kept."""
        return self.length - self.saved

    def answer(
        self, message: str, limit: int = 0, stop: Callable[[], bool] = lambda: False
    ) -> Generator[str]:
        """The answer's text as it appears. Close the iterator at any time; the stream then goes on from there.

        Args:
          limit: tokens at most; 0 for no limit.
          stop: asked between chunks of the message and between tokens of the answer. Where it stops the reading, the
            stream holds the first part of the message (`reading`), and the next message goes on with it.

        Raises:
          ValueError: the chat template refuses the message. The stream is as it was.
        """
        turn = self.dialog.turn(message)
        self.reading = (0, len(turn.ids))
        logits = None if stop() else self._read(turn, stop)
        if logits is None:
            return
        if stop():  # all of the message was read, none of the answer drawn
            self.dialog.answered("")
            return
        config, params, tokenizer = self.model
        ends = {*tokenizer.eos_ids, *self.dialog.closing}
        generation = stream.Generation(
            config, params, self.cache, logits, sampling=self.sampling, key=self.key
        )
        words, shown = TextStream(tokenizer, special=False), []
        try:
            for i, token_B in enumerate(generation, start=1):
                self.cache, token = generation.cache, int(token_B[0])
                # The end of an answer is not fed: the template's own comes with the next turn.
                self._unread = [] if token in ends else [token]
                if not self._unread:
                    break
                # Weights can have rows for more tokens than there are: such a one is nothing to show.
                shown.append(words.push(token) if token < tokenizer.vocab_size else "")
                yield shown[-1]
                if i == limit or stop():
                    break
            shown.append(words.flush())
            yield shown[-1]
        finally:
            self.cache = generation.cache
            self.dialog.answered("".join([*shown, words.flush()]))

    def _read(self, turn: Turn, stop: Callable[[], bool]) -> jax.Array | None:
        """Feeds a turn. Returns the logits after it, or None where the reading was stopped."""
        config, params, _ = self.model
        ids, before = self._unread + turn.ids, len(self._unread)
        if not turn.ids:
            raise ValueError("the chat template renders this message as nothing")
        if self.reserve:
            self._make_room(len(ids) + self.reserve)
        done, until, asked, logits = 0, len(ids), False, None
        while done < until:
            if done and not asked and stop():
                asked = True
                count, end = self.dialog.stops_at(turn, done - before)
                until = before + count
                if until < len(ids):
                    self.dialog.stopped(turn, end)
                continue
            n = min(PROMPT_CHUNK, until - done)
            logits, self.cache = stream.extend(
                config, params, self.cache, [ids[done : done + n]], chunks=(PROMPT_CHUNK,)
            )
            done, self._unread = done + n, []
            self.reading = (done - before, len(turn.ids))
        if until < len(ids):
            return None
        self.dialog.opened(turn)
        return logits

    def _make_room(self, coming: int) -> None:
        """Forgets the oldest turns, whole, until `coming` tokens fit. Where that is never enough, tokens go one by one."""
        needed = self.length + coming - self.spec.capacity
        turns = self._turns if self.dialog.held else [*self._turns, self.length]
        self._turns = [turn for turn in turns if turn - self.spec.sinks >= self.forgotten]
        fits = [turn for turn in self._turns if turn - self.spec.sinks >= needed]
        if needed > self.forgotten and fits:
            self.cache = evict_before(self.cache, fits[0])

    def save(self, folder: str) -> None:
        """Keeps the stream's state in a folder: a new one, or the one that holds an earlier state of this stream.

        What was there before is whole until the new state is.

        Raises:
          ValueError: the folder holds something else, or cannot be written.
        """
        path, stamp = _path(folder), secrets.token_hex(8)
        try:
            fits = not path.exists() or self._was_saved_in(path)
            if fits:
                self._write(path, stamp)
        except Exception as error:  # orbax passes on every error of the storage
            why = "No space left" if is_full(error) else _one_line(error)
            raise ValueError(
                f"{path} cannot be written ({why}): the stream goes on as it was, save it elsewhere"
            ) from error
        if not fits:
            raise ValueError(f"{path} is there already: choose a new name")
        self._stamps.add(stamp)
        self.saved = self.length

    def load(self, folder: str) -> None:
        """Continues a saved stream, with the sampling and the key that it was saved with.

        Raises:
          ValueError: the folder holds none, or one of another model or cache. The stream is as it was.
        """
        path = _path(folder)
        meta = _meta(path)
        if meta.get("chat") != FORMAT:
            raise ValueError(
                f"{path} was saved by another version: go on there, or begin a new stream with /new"
            )
        config = self.model.config
        if meta["model"] != _model(self.model) or meta["spec"] != asdict(self.spec):
            flags = _flags(meta)
            raise ValueError(
                f"{path} was saved with {flags}: start `python -m sinks.chat {flags}`, then /load {path}"
            )
        if None not in (self.weights, meta.get("weights")) and self.weights != meta["weights"]:
            raise ValueError(
                f"{path} was saved with other weights of the same shape ({meta['name'] or 'no name'}): start the chat "
                "with those, then /load it"
            )
        try:
            dialog = templates.restore(self.model.tokenizer, meta["dialog"])
            shapes = cache.abstract(config, self.spec, stacked=meta["stacked"])
            state = restore_params(path, {"cache": shapes}, ())
        except (ValueError, DamagedError, OSError) as error:
            raise ValueError(f"{path} cannot be continued: {_one_line(error)}") from error
        self.cache = cache.restack(state["cache"], self._stacked)
        self.dialog, self._unread, self._turns = dialog, meta["unread"], meta["turns"]
        self.sampling, self._stamps = Sampling(**meta["sampling"]), {meta["stamp"]}
        key = jnp.asarray(meta["key"], jnp.uint32)
        self.key = jax.random.wrap_key_data(key, impl=meta["key_kind"])
        self.reading, self.saved = (0, 0), self.length

    @property
    def _stacked(self) -> bool:
        return isinstance(self.model.params["blocks"], dict)

    def _write(self, path: Path, stamp: str) -> None:
        part = path.with_name(f".{path.name}.{stamp}.part")
        try:
            with Checkpointer(part) as saver:
                saver.save(self.length, {"cache": self.cache}, self._state(stamp), wait=True)
            _put_in_place(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _was_saved_in(self, path: Path) -> bool:
        """Whether what the folder holds is an earlier state of this very stream."""
        try:
            return _meta(path).get("stamp") in self._stamps
        except ValueError:
            return False

    def _state(self, stamp: str) -> dict[str, Any]:
        """All but the cache, as JSON."""
        return {
            "chat": FORMAT,
            "stamp": stamp,
            "name": self.name,
            "model": _model(self.model),
            "weights": self.weights,
            "spec": asdict(self.spec),
            "stacked": self._stacked,
            "sampling": asdict(self.sampling),
            "key": jax.random.key_data(self.key).tolist(),
            "key_kind": str(jax.random.key_impl(self.key)),
            "dialog": self.dialog.state(),
            "unread": self._unread,
            "turns": self._turns,
        }


def _model(model: Model) -> str:
    return str(model.config)


def _flags(meta: dict[str, Any]) -> str:
    """The command line's settings with which a stream was saved."""
    spec = meta["spec"]
    name = [f"--model={shlex.quote(meta['name'])}"] if meta["name"] else []
    size = [f"--sinks={spec['sinks']}", f"--recent={spec['recent']}"]
    return " ".join([*name, *size, *(["--int8"] if spec["int8"] else [])])


def _path(folder: str) -> Path:
    """Raises ValueError for what is no path of a file system."""
    check_local(folder, "folder")
    try:
        path = Path(folder).expanduser()
        return (
            path.resolve() if os.path.islink(path) else path
        )  # so that what a link names is replaced
    except (RuntimeError, OSError) as error:  # ~somebody, a link to itself
        raise ValueError(f"{folder}: {error}") from error


def _meta(path: Path) -> dict[str, Any]:
    """What `_state` was. Raises ValueError where the folder holds no whole checkpoint."""
    try:
        if not path.is_dir():
            raise FileNotFoundError
        return read_meta(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is no folder that /save made") from None
    except (DamagedError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {_one_line(error)}") from error


def _put_in_place(part: Path, path: Path) -> None:
    if not path.exists():
        part.rename(path)
        return
    old = part.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    try:
        part.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
