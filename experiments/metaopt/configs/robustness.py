"""Our benchmark: one setting for each method, from initial rates 1e-7 to 1e1, on one of four tasks.

  python -m experiments.launch --config=experiments/metaopt/configs/robustness.py --workdir=runs/robustness
  python -m experiments.launch --config=experiments/metaopt/configs/robustness.py:task=charrnn --workdir=runs/charrnn_robust

Methods without a learning rate sweep their own initial guess (docs/papers/gdtuo.md 6.3). MNIST is always whole, an hour on
two cores. The other tasks train on a part of their data from every second rate (CIFAR-10 with a ResNet-8), two to three
hours on a core; `full` is every rate and all data, for accelerators. Texts: see charrnn.py.

Arguments: task=mnist, cifar10, charrnn or gpt; full; smoke; epochs=N; seeds=N.
"""

from common.config import parse_arg
from experiments.metaopt.configs.base import base, seeds, smoke

METHODS = (
    "auto(adam)", "auto(sgd)", "adam", "cosine(adam)", "sgd", "cosine(sgd)", "greedy(adam)", "tower1(adam)", "tower3(sgd)",
    "metaoptimize", "prodigy", "dadapt_adamw", "mechanic(adam)", "schedule_free", "dog", "momo_adam",
)  # fmt: skip
RATES = tuple(10.0**k for k in range(-7, 2))
SMALL = {  # task settings, epochs: 150, 800 and 640 steps
    "cifar10": ({"depth": 8, "examples": 3840}, 5),
    "charrnn": ({"examples": 10_000}, 4),
    "gpt": ({"examples": 5120}, 4),
}
FULL = {"mnist": 10, "cifar10": 50, "charrnn": 10, "gpt": 10}  # epochs


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False, task="mnist", full=False, epochs=0, seeds=1)
    config = base(args.task)
    config.name = "robustness" if args.task == "mnist" else f"robustness_{args.task}"
    config.methods = METHODS
    config.grid.update(epochs=FULL[args.task], rates=RATES, seeds=seeds(args))
    if args.task in SMALL and not args.full:
        settings, config.grid.epochs = SMALL[args.task]
        config.task.update(settings)
        config.grid.update(rates=RATES[::2], save_every=1)
    if "epochs" in args.given:
        config.grid.epochs = args.epochs
    return smoke(config, args) if args.smoke else config
