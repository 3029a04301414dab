"""A conversation without end in the terminal, at constant memory.

  python -m sinks.chat
  python -m sinks.chat --model=folder/ --sinks=4 --recent=1020 --temperature=0.7 --top_p=0.9 --seed=1

The model sees the first tokens of the conversation and the most recent ones. What lies between is forgotten: the stream goes
on for ever, but its memory is the cache. Ctrl-C stops an answer; a second one, at the prompt, leaves.

  /save FOLDER   keeps the stream's state; /load FOLDER continues from it, in any later session of the same model
  /new           begins a new stream; /help shows this; /quit leaves
"""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import jax

import sinks
from common.checkpoint import Checkpointer, DamagedError, StructureError
from common.host import keep_freed_memory
from sinks import cache, hub, stream
from sinks.cache import CacheSpec
from sinks.loading import Model
from sinks.policies import evict_before
from sinks.sampling import Sampling
from sinks.tokenizer import TextStream

PROMPT_CHUNK = 64  # tokens of a prompt at a time
MARK = "\x1fanswer\x1f"  # stands for the last answer in the template: what follows it is what the stream has yet to see


@dataclass
class Conversation:
    """One stream of turns. Only the cache grows old with it: nothing here grows.

    Attributes:
      model: with parameters from `stream.prepare`.
      key: draws the answers; with the same key, messages and settings they are the same.
      reserve: tokens of room made for each answer by forgetting whole turns, so that none is remembered without its
        beginning while there is a choice; 0: token by token, as in the paper.
    """

    model: Model
    spec: CacheSpec
    sampling: Sampling
    key: jax.Array
    system: str = ""
    reserve: int = 0

    def __post_init__(self):
        stream.check_spec(self.model.config, self.spec)
        self.new()

    def new(self) -> None:
        """Forgets everything."""
        self._unread: list[int] = []  # shown, but not yet fed to the model
        self._turns: list[int] = []  # where the remembered turns begin
        self.cache = cache.init(
            self.model.config, self.spec, stacked=isinstance(self.model.params["blocks"], dict)
        )

    @property
    def length(self) -> int:
        """Tokens of the stream so far."""
        return int(self.cache.length[0])

    @property
    def forgotten(self) -> int:
        """Tokens that have left the cache."""
        return max(int(self.cache.evicted[0]), self.length - self.spec.capacity, 0)

    def turn(self, message: str) -> str:
        """What the stream has to see before it answers `message`: the last answer's end, the message, the opening."""
        user = {"role": "user", "content": message}
        tokenizer = self.model.tokenizer
        if not tokenizer.chat_template:
            return f"{chr(10) if self.length else ''}USER: {message}\nASSISTANT:"
        if self.length:
            before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": MARK}]
            return tokenizer.chat([*before, user]).rpartition(MARK)[2]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return tokenizer.chat([*system, user])

    def answer(self, message: str, limit: int = 0) -> Generator[str]:
        """The answer's text as it appears. Close the iterator at any time; the stream then goes on from there.

        Args:
          limit: tokens at most; 0 for no limit.
        """
        config, params, tokenizer = self.model
        ids = self._unread + tokenizer.encode(self.turn(message))
        if self.reserve:
            self._make_room(len(ids) + self.reserve)
        logits, self.cache = stream.extend(
            config, params, self.cache, [ids], chunks=(PROMPT_CHUNK,)
        )
        generation = stream.Generation(
            config, params, self.cache, logits, sampling=self.sampling, key=self.key
        )
        words = TextStream(tokenizer, special=False)
        try:
            for i, token_B in enumerate(generation, start=1):
                self.cache, token = generation.cache, int(token_B[0])
                self._unread = [] if token in tokenizer.eos_ids else [token]
                if not self._unread:
                    break
                yield words.push(token)
                if i == limit:
                    break
            yield words.flush()
        finally:
            self.cache = generation.cache

    def _make_room(self, coming: int) -> None:
        """Forgets the oldest turns, whole, until `coming` tokens fit. Where that is never enough, tokens go one by one."""
        needed = self.length + coming - self.spec.capacity
        turns = [*self._turns, self.length]
        self._turns = [turn for turn in turns if turn - self.spec.sinks >= self.forgotten]
        fits = [turn for turn in self._turns if turn - self.spec.sinks >= needed]
        if needed > self.forgotten and fits:
            self.cache = evict_before(self.cache, fits[0])

    def save(self, folder: str) -> None:
        """Keeps the stream's state in a new folder. Raises ValueError where it is not new."""
        path = Path(folder).expanduser()
        if path.exists():
            raise ValueError(f"{path} is there already: choose a new name")
        with Checkpointer(path) as saver:
            meta = {"config": str(self.model.config), "unread": self._unread, "turns": self._turns}
            saver.save(self.length, {"cache": self.cache}, meta, wait=True)

    def load(self, folder: str) -> None:
        """Continues a saved stream. Raises ValueError where the folder holds none of this model and cache."""
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise ValueError(f"{path} is no folder that /save made")
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.cache)
        with Checkpointer(path) as saver:
            try:
                restored = saver.restore({"cache": shapes})
            except (StructureError, DamagedError) as error:
                raise ValueError(str(error)) from error
        if restored is None:
            raise ValueError(f"{path} is no folder that /save made")
        state, meta = restored
        if meta["config"] != str(self.model.config):
            raise ValueError(f"{path} is a stream of another model: {meta['config']}")
        self.cache, self._unread, self._turns = state["cache"], meta["unread"], meta["turns"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sinks.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", default="smollm2-135m", help="name, .gguf file, folder, owner/name"
    )
    parser.add_argument("--sinks", type=int, default=4, help="first tokens kept for ever")
    parser.add_argument("--recent", type=int, default=1020, help="recent tokens kept")
    parser.add_argument("--int8", action="store_true", help="keep the recent tokens in 8 bits")
    parser.add_argument(
        "--weights",
        choices=("float32", "bfloat16", "int8"),
        help="how weights are kept (default: int8 on a CPU, where it is twice as fast; float32 elsewhere)",
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="0: off")
    parser.add_argument("--top_p", type=float, default=0.9, help="1: off")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--limit", type=int, default=0, help="tokens of an answer; 0: none")
    parser.add_argument(
        "--reserve",
        type=int,
        default=256,
        help="room made by forgetting whole turns; 0: token by token",
    )
    parser.add_argument("--system", default="", help="the system message")
    args = parser.parse_args(argv)
    try:
        spec = CacheSpec(args.sinks, args.recent, int8=args.int8)
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        parser.error(str(error))
    weights = args.weights or ("int8" if jax.default_backend() == "cpu" else "float32")
    keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", str(hub.cache_folder() / "compiled"))
    try:
        model = sinks.load(args.model, dtype="bfloat16" if weights == "bfloat16" else "float32")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    params = stream.prepare(model.params, int8=weights == "int8")
    model = model._replace(params=params)
    talk = Conversation(model, spec, sampling, jax.random.key(args.seed), args.system, args.reserve)
    megabytes = spec.nbytes(model.config) / 1e6
    print(
        f"{args.model}: the first {spec.sinks} and the last {spec.recent} tokens are remembered ({megabytes:.0f} MB); what "
        "lies between is forgotten. /help for commands. The first answer waits for a compilation."
    )
    while True:
        try:
            message = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if message == "/quit":
            return 0
        try:
            if message.startswith("/"):
                print(_command(talk, message))
            elif message:
                _reply(talk, message, args.limit)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


def _command(talk: Conversation, message: str) -> str:
    name, _, argument = message.partition(" ")
    if name in ("/save", "/load") and not argument:
        raise ValueError(f"{name} needs a folder: {name} FOLDER")
    if name == "/save":
        talk.save(argument)
        return f"saved {talk.length:,} tokens' stream in {argument}"
    if name == "/load":
        talk.load(argument)
        return f"at token {talk.length:,}, of which {talk.forgotten:,} are forgotten"
    if name == "/new":
        talk.new()
        return "a new stream"
    if name == "/help":
        return str(__doc__)
    raise ValueError(f"{name} is no command; /help lists them")


def _reply(talk: Conversation, message: str, limit: int) -> None:
    """Prints the answer as it appears, and a line of facts. Ctrl-C stops the answer, not the program."""
    stopped = threading.Event()  # checked between tokens: a step cut in two would leave no cache
    handler = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    before, began, answer = talk.length, 0.0, talk.answer(message, limit)
    try:
        for i, piece in enumerate(answer):
            if i == 1:  # the first token waits for the prompt, and once for a compilation
                began, before = time.perf_counter(), talk.length
            print(piece, end="", flush=True)
            if stopped.is_set():
                break
        answer.close()
    finally:
        signal.signal(signal.SIGINT, handler)
    seconds = time.perf_counter() - began if began else 0.0
    rate = (talk.length - before) / seconds if seconds else 0.0
    filled = min(talk.length, talk.spec.capacity) / talk.spec.capacity
    print(
        f"\n\x1b[2m[{rate:.1f} tokens/s, cache {100 * filled:.0f} % full, {talk.length:,} tokens so far, "
        f"{talk.forgotten:,} forgotten]\x1b[0m"
    )


if __name__ == "__main__":
    sys.exit(main())
