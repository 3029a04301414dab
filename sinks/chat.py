"""A conversation without end in the terminal, at constant memory of the model.

  python -m sinks.chat
  python -m sinks.chat --model=folder/ --sinks=4 --recent=1020 --temperature=0.7 --top_p=0.9 --seed=1

The model sees the first tokens of the conversation and the most recent ones. What lies between is forgotten: the stream goes
on forever. A message may be longer than what is remembered: it is streamed.

  Ctrl-C         stops an answer, or the reading of a message: the next message then goes on with what was read of it
  Alt-Enter      begins a new line of the message; several lines that are pasted are one message; arrow keys edit, and bring
                 back earlier messages of this session (they are kept in memory alone)
  /save FOLDER   keeps the stream's state; again with the same folder, its newer state
  /load FOLDER   continues from it, in any later session of the same model, --sinks, --recent and --int8
  /new           begins a new stream
  /help          shows this
  /quit          leaves, as Ctrl-D or a second Ctrl-C does; a stream that was not saved is offered to be
"""

import argparse
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable

if __name__ == "__main__":  # Ctrl-C while the libraries are loaded, a second or more
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import jax

import sinks
from common.cpu_heap import keep_freed_memory
from sinks import hub, ops, stream
from sinks.cache import CacheSpec
from sinks.conversation import Conversation
from sinks.params import fingerprint
from sinks.sampling import Sampling
from sinks.terminal import dim, ending_quietly, erase, handling_interrupts, make_reader, say

__all__ = ["Conversation", "main"]


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.limit < 0:
            raise ValueError(f"--limit={args.limit}: 0 (none) or more")
        if not 0 <= args.seed < 2**32:
            raise ValueError(f"--seed={args.seed}: from 0 to 2^32 - 1")
        spec = CacheSpec(args.sinks, args.recent, int8=args.int8)
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        parser.error(str(error))
    keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", str(hub.cache_folder() / "compiled"))
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _open_and_converse(args, spec, sampling)


def _open_and_converse(args: argparse.Namespace, spec: CacheSpec, sampling: Sampling) -> int:
    weights = args.weights or ops.chat_weights()
    try:
        model = sinks.load(args.model, dtype="bfloat16" if weights == "bfloat16" else "float32")
        seal = fingerprint(model.params)
        params = stream.prepare(model.params, int8=weights == "int8")
        model, key = model._replace(params=params), jax.random.key(args.seed)
        talk = Conversation(model, spec, sampling, key, args.system, args.reserve, args.model, seal)
    except (ValueError, OSError) as error:
        say(f"error: {error}", error=True)
        return 2
    except KeyboardInterrupt:
        return 130
    say(
        f"{args.model}: the first {spec.sinks} and the last {spec.recent} tokens are remembered "
        f"({spec.nbytes(model.config) / 1e6:.0f} MB); what lies between is forgotten. /help for commands. The first answer "
        "waits for a compilation."
    )
    stopped = threading.Event()  # checked between tokens: a step cut in two would leave no cache
    with handling_interrupts(lambda *_: stopped.set()):
        _converse(talk, args.limit, make_reader(), stopped)
    return 0


def _warn(message: Warning | str, *_, **__) -> None:
    say(f"warning: {message}", error=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sinks.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="name, .gguf file, folder, owner/name")
    add("--sinks", type=int, default=4, help="first tokens kept forever")
    add("--recent", type=int, default=1020, help="recent tokens kept")
    add("--int8", action="store_true", help="keep the recent tokens in 8 bits")
    add(
        "--weights",
        choices=("float32", "bfloat16", "int8"),
        help="how weights are kept (default: int8 on a CPU, where it is twice as fast; float32 elsewhere)",
    )
    add("--temperature", type=float, default=0.7, help="0: the likeliest token")
    add("--top_k", type=int, default=0, help="0: off")
    add("--top_p", type=float, default=0.9, help="1: off")
    add("--seed", type=int, default=0, help="of what is drawn")
    add("--limit", type=int, default=0, help="tokens of an answer; 0: none")
    add(
        "--reserve",
        type=int,
        default=256,
        help="room made by forgetting whole turns; 0: token by token",
    )
    add("--system", default="", help="the system message")
    return parser


def _converse(
    talk: Conversation, limit: int, read: Callable[[str], str], stopped: threading.Event
) -> None:
    """Messages and commands until the user leaves."""
    leaving = False  # the last key was Ctrl-C
    while True:
        try:
            message = read("\n> ").strip()
        except KeyboardInterrupt:
            if leaving:
                break
            leaving = True
            say("\nCtrl-C again, /quit or Ctrl-D leaves; the stream is as it was")
            continue
        except EOFError:
            say("")
            break
        leaving = False
        stopped.clear()
        if message == "/quit":
            break
        try:
            if message.startswith("/") and "\n" not in message:
                say(_command(talk, message))
            elif message:
                _reply(talk, message, limit, stopped)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            # A template may refuse everything after what was said.
            restart = (
                "" if message.startswith("/") or not talk.length else "; /new begins a new stream"
            )
            say(f"error: {error}{restart}", error=True)
    _offer_to_save(talk, read)


def _command(talk: Conversation, message: str) -> str:
    name, _, argument = message.partition(" ")
    argument = argument.strip()
    if name in ("/save", "/load") and not argument:
        raise ValueError(f"{name} needs a folder: {name} FOLDER")
    lost = f"; {talk.unsaved:,} tokens of the former one were not saved" if talk.unsaved else ""
    if name == "/save":
        talk.save(argument)
        return f"saved {talk.length:,} tokens' stream in {argument}"
    if name == "/load":
        talk.load(argument)
        drawn = talk.sampling
        return (
            f"at token {talk.length:,}, of which {talk.forgotten:,} are forgotten; answers are drawn as they were "
            f"(temperature {drawn.temperature:g}, top_k {drawn.top_k}, top_p {drawn.top_p:g}){lost}"
        )
    if name == "/new":
        talk.new()
        return f"a new stream{lost}"
    if name == "/help":
        return str(__doc__)
    raise ValueError(f"{name} is no command; /help lists them")


def _reply(talk: Conversation, message: str, limit: int, stopped: threading.Event) -> None:
    """Prints the answer as it appears, and a line of facts. Ctrl-C stops it, not the program."""
    before, began, answered = talk.length, 0.0, False
    for i, piece in enumerate(talk.answer(message, limit, _watched(talk, stopped))):
        if i == 0:
            erase()
        if i == 1:  # the first token waits for the prompt, and once for a compilation
            began, before = time.perf_counter(), talk.length
        answered = True
        say(piece, end="")
    if not answered:
        erase()
    read, whole = talk.reading
    if stopped.is_set() and not answered:
        part = f"the first {read:,} of {whole:,} tokens" if read < whole else "all"
        goes_on = "; what you write next goes on with it" if 0 < read < whole else ""
        say(f"stopped: the stream holds {part if read else 'nothing'} of this message{goes_on}")
    seconds = time.perf_counter() - began if began else 0.0
    rate = (talk.length - before) / seconds if seconds else 0.0
    filled = min(talk.length, talk.spec.capacity) / talk.spec.capacity
    facts = (
        f"[{rate:.1f} tokens/s, cache {100 * filled:.0f} % full, {talk.length:,} tokens so far, "
        f"{talk.forgotten:,} forgotten]"
    )
    print(f"\n{dim(facts)}", flush=True)


def _watched(talk: Conversation, stopped: threading.Event) -> Callable[[], bool]:
    """Whether to stop; asked between chunks, it shows how far the reading of a long message is."""
    then = time.monotonic()

    def ask() -> bool:
        nonlocal then
        read, whole = talk.reading
        if 0 < read < whole and time.monotonic() - then > 1:
            then = time.monotonic()
            erase(f"reading: {read:,} of {whole:,} tokens")
        return stopped.is_set()

    return ask


def _offer_to_save(talk: Conversation, read: Callable[[str], str]) -> None:
    """Asks at the end where to keep a stream that is not saved; warns where nobody can answer."""
    ask = "{:,} tokens of the stream are not saved"
    if talk.unsaved and not sys.stdin.isatty():
        say(ask.format(talk.unsaved))
        return
    while talk.unsaved:
        try:
            question = f"{ask.format(talk.unsaved)}. Save it in a folder (Enter: leave without)? "
            folder = read(question).strip()
            if not folder:
                return
            talk.save(folder)
            say(f"saved in {folder}")
        except (EOFError, KeyboardInterrupt):
            return
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            say(f"error: {error}", error=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(ending_quietly(main))
