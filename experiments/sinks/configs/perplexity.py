"""The perplexity of long texts under every policy, cache size and number of sinks (paper, Figures 3 and 5, Tables 1, 2, 6).

  python -m experiments.launch --config=experiments/sinks/configs/perplexity.py --workdir=runs/perplexity
  ... perplexity.py:text=~/books,tokens=4000000,policies=sinks,sinks=4 --workdir=runs/four_million

Arguments: smoke; model=NAME; text=WHERE; tokens=N; policies=A+B; cache_sizes=M+N; sinks=M+N.
"""

from ml_collections import ConfigDict

from common.config import parse_arg


def get_config(arg: str = ""):
    args = parse_arg(
        arg,
        smoke=False,
        model="smollm2-135m",
        text="embedded",
        tokens=0,
        policies="window+sinks",
        cache_sizes="1024",
        sinks="1+2+4+8",
    )
    smoke = {
        "cache_sizes": (16,),
        "sinks": (2,),
        "tokens": 100,
        "block": 8,
        "chunk": 32,
        "save_every": 1,
    }
    config = {
        "job": "sinks_perplexity",
        "name": "perplexity",
        "model": args.model,  # a name, a .gguf file, a safetensors folder or owner/name
        "dtype": "bfloat16",  # of weights and cache; sums are float32
        "int8": False,  # the ring in 8 bits
        "text": args.text,  # "embedded", a file, or a folder of .txt, read in order of their names as one stream
        "tokens": args.tokens,  # of the text; 0: all
        "bos": True,  # the model's first token before each document
        "policies": tuple(args.policies.split("+")),  # of sinks/policies.py
        "cache_sizes": tuple(map(int, args.cache_sizes.split("+"))),  # S + R
        "sinks": tuple(map(int, args.sinks.split("+"))),
        "sample": 0,  # predictions per chunk of policy "recompute"; 0: all, at cache_size times the work
        "block": 256,  # tokens of a turn, of policy "evict_for_space": room is made for all of it; below cache_size - sinks
        "chunk": 1024,  # tokens at a time; but for `sample`, no result depends on it
        "save_every": 32,  # chunks between checkpoints
        "seed": 0,
    }
    small = {name: n for name, n in smoke.items() if name not in args.given}
    return ConfigDict(config | (small if args.smoke else {}))
