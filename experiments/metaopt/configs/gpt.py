"""A GPT of 4 blocks (0.8 M parameters) on the characters of War and Peace: Adam fixed and by cosine, and ours.

  python -m experiments.launch --config=experiments/metaopt/configs/gpt.py --workdir=runs/gpt --config.task.data=BOOK.txt

Arguments: smoke; epochs=N (of 1,253 steps on the whole book; a step takes 0.16 CPU seconds on a core of a Xeon); seeds=N.
"""

from common.config import parse_arg
from experiments.metaopt.configs.base import base, seeds, smoke


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False, epochs=10, seeds=1)
    config = base("gpt")
    config.name = "gpt"
    config.methods = ("adam", "cosine(adam)", "auto(adam)", "tower1(adam)", "prodigy")
    config.grid.update(epochs=args.epochs, rates=(1e-4, 1e-3, 1e-2))
    config.grid.update(seeds=seeds(args), save_every=1)
    return smoke(config, args) if args.smoke else config
