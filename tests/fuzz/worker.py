"""Loads damaged checkpoints, one after another, and says what became of each.

    python -m tests.fuzz.worker gguf 7 112          # the mutant 112 of seed 7: what it is, and what happens
    python -m tests.fuzz.worker folder 7 100 125    # those from 100 to 124
    python -m tests.fuzz.worker folder 7 112 --keep DIR    # and leave its files there

Prints a line of JSON for each when it begins and when it is done, so that whoever started this knows which one it was
that took it down. Memory and CPU time are limited.
"""

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

import sinks
from sinks import loading
from sinks import params as layouts
from tests.fuzz import folder_mutants, gguf_mutants
from tests.fuzz.mutant import LOAD, REFUSE, Mutant

MAKE = {"gguf": gguf_mutants.mutant, "folder": folder_mutants.mutant}
SECONDS = 20  # of CPU time, for one mutant
MEMORY = (
    1 << 30
)  # bytes of address space beyond what the imports took; the models take less than one million
_read: set[Any] = set()


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))


def limit_time() -> None:
    """The process is killed if it computes for SECONDS more."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def problem_of_error(error: Exception, folder: Path) -> str:
    """What is wrong with how a checkpoint is refused; "" if nothing is."""
    text = str(error)
    if type(error) is not ValueError:
        return f"{type(error).__name__} instead of ValueError: {text[:300]}"
    if str(folder) not in text.splitlines()[0]:
        return f"does not name the file: {text[:300]}"
    if loading.UNFORESEEN in text:
        return f"seen by no check: {text[:500]}"
    if not text.replace("\n", "").isprintable():
        return f"characters that a terminal obeys: {text[:300]!r}"
    if "\n" in text and "do not fit the" not in text:
        return f"more than a line: {text[:300]}"
    return "too long" if len(text) > 8000 else ""


def problem_of_model(model: sinks.Model, folder: Path) -> str:
    """What is wrong with a model that was loaded; "" if nothing is."""
    config, params, text = model
    if jax.tree.map(np.shape, params) != jax.tree.map(lambda p: p.shape, layouts.abstract(config)):
        return "other shapes than its config's"
    for leaf in jax.tree.leaves(params):
        if leaf.dtype != np.float32 or not np.isfinite(leaf).all():
            return f"parameters of {leaf.dtype} that are not finite, or no floats"
    ids = text.encode("The 12 é\n<|im_start|>")
    special = [*text.eos_ids, *([] if text.bos_id is None else [text.bos_id])]
    if not all(isinstance(i, int) and 0 <= i < config.vocab_size for i in [*ids, *special]):
        return f"ids {ids} or {special} are not below {config.vocab_size}"
    text.decode([i for i in special if i < text.vocab_size])
    if not isinstance(text.chat_template, str):
        return f"a template that is {type(text.chat_template)}"
    try:
        text.chat([{"role": "user", "content": "a"}])
    except ValueError as error:
        if "chat template" not in str(error):
            return f"the template: {error}"
    if (known := (config, tuple(text.encode(loading.PARAGRAPH)))) in _read:
        return ""
    _read.add(known)
    try:
        loading.check_reading(config, params, text, str(folder))
    except ValueError as error:
        return problem_of_error(error, folder)
    return ""


def outcome(mutant: Mutant, folder: Path) -> tuple[str, str]:
    """What became of it, and what is wrong with that ("" if nothing is)."""
    for name, raw in mutant.files.items():
        (folder / name).write_bytes(raw)
    try:
        model = sinks.load(folder / mutant.entry, check=False)
    except Exception as error:
        wrong = "it is a good file" if mutant.must == LOAD else problem_of_error(error, folder)
        return f"refused: {error}".replace(str(folder), "..."), wrong
    try:
        wrong = problem_of_model(model, folder)
    except Exception:
        wrong = f"loaded, and then: {traceback.format_exc()}"
    return "loaded", wrong or ("it is no good file" if mutant.must == REFUSE else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", choices=MAKE)
    parser.add_argument("seed", type=int)
    parser.add_argument("first", type=int)
    parser.add_argument("stop", type=int, nargs="?")
    parser.add_argument("--keep", type=Path, help="a folder for the files")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    jax.config.update("jax_compilation_cache_dir", None)
    loading.PARAGRAPH = loading.PARAGRAPH[:60]
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.zeros(3)))  # starts XLA's threads
    limit_memory()
    if hasattr(signal, "SIGXCPU"):
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    bad = 0
    for index in range(args.first, args.stop or args.first + 1):
        mutant = MAKE[args.format](args.seed, index)
        about = {"index": index, "what": f"{mutant.what} ({mutant.must})"}
        print(json.dumps(about), flush=True)
        limit_time()
        with tempfile.TemporaryDirectory() as scratch:
            folder = args.keep or Path(scratch)
            folder.mkdir(exist_ok=True)
            what, wrong = outcome(mutant, folder)
        bad += bool(wrong)
        print(json.dumps({**about, "outcome": what, "wrong": wrong}), flush=True)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
