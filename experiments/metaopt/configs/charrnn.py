"""Figure 3: a char-RNN on War and Peace, 50,000 steps from rates 1e-4, 2e-3 and 1e-2; Adam, the paper's tower, and ours.

  python -m experiments.launch --config=experiments/metaopt/configs/charrnn.py --workdir=runs/charrnn \\
    --config.task.data=BOOK.txt

The book is Project Gutenberg's 2600, or its text in PG-19; `--config.task.data=embedded` takes the beginning that comes
with Triptych. Batch 50 and windows of 50 characters are torch-rnn's, whose rate the paper takes; every window starts from a
state of zeros; the last fifth of the book is the test. A step takes 0.11 CPU seconds on a core of a Xeon: 20 hours for
all on one core.

Arguments: smoke; epochs=N (49 are 50,274 steps of the whole book); seeds=N.
"""

from common.config import parse_arg
from experiments.metaopt.configs.base import base, seeds, smoke


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False, epochs=49, seeds=1)
    config = base("charrnn")
    config.name = "charrnn"
    config.methods = ("adam", "figure3_tower", "auto(adam)", "cosine(adam)")
    config.grid.update(epochs=args.epochs, rates=(1e-4, 2e-3, 1e-2))
    config.grid.update(seeds=seeds(args), save_every=1)
    return smoke(config, args) if args.smoke else config
