"""Text without end at constant memory: a window of recent tokens breaks, four attention sinks hold.

    python examples/endless_text.py

SmolLM2-135M (fetched once, about 100 MB) reads the beginning of War and Peace through 256 tokens, then writes on.
"""

import itertools
import sys

import numpy as np

import sinks
from sinks import perplexity, stream, text
from sinks.policies import make_policy

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"  # a name, a .gguf file, a folder
TOKENS, CACHE, CHUNK, NEW_TOKENS = 1280, 256, 128, 40


def main() -> None:
    config, params, tokenizer = sinks.load(MODEL)
    book = text.documents("embedded")[0].text
    ids = np.asarray(tokenizer.encode(book[: 8 * TOKENS])[:TOKENS], np.int32)

    params = stream.prepare(params, stacked=True)
    print(f"perplexity of each {CHUNK} tokens of {TOKENS}")
    for n_sinks in (0, 4):
        name = "sinks" if n_sinks else "window"
        print(f"{name:6s} {n_sinks}+{CACHE - n_sinks}:", end="")
        policy = make_policy(name, cache_size=CACHE, sinks=n_sinks)
        for piece in perplexity.score(config, params, policy, ids, chunk=CHUNK):
            print(f" {np.exp(piece.nll[piece.scored].mean()):.0f}", end="", flush=True)
        print()

    # The cache has read all but the last token, which nothing follows. From there, the model writes.
    logits, cache = stream.extend(config, params, piece.state, [ids[-1:]])
    drawn = stream.Generation(config, params, cache, logits)
    print(f"\n{tokenizer.decode(ids[-20:].tolist())} | ", end="")
    for token in itertools.islice(drawn, NEW_TOKENS):
        print(tokenizer.decode([int(token[0])]), end="", flush=True)
    print(f"\n\nread and written: {int(drawn.cache.length[0])} tokens; kept: {CACHE}")


if __name__ == "__main__":
    main()
