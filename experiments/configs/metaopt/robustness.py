"""Our benchmark on MNIST: one setting for each method, initial rates 1e-7 to 1e1, 10 epochs. About an hour on two cores.

  python -m experiments.launch --config=experiments/configs/metaopt/robustness.py --workdir=runs/robustness

Methods without a learning rate sweep their own initial guess (spec 6.3). Arguments: smoke; epochs=N; seeds=N.
"""

from common.config import parse_arg
from experiments.configs.metaopt.base import base, smoke

METHODS = (
    "auto(adam)", "auto(sgd)", "adam", "sgd", "greedy(adam)", "tower1(adam)", "tower3(sgd)", "metaoptimize", "prodigy",
    "dadapt_adamw", "mechanic(adam)", "schedule_free", "dog", "momo_adam",
)  # fmt: skip


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False, epochs=10, seeds=1)
    config = base()
    config.name = "robustness"
    config.grid.update(
        epochs=args.epochs,
        seeds=tuple(range(args.seeds)),
        rates=tuple(10.0**k for k in range(-7, 2)),
    )
    config.methods = METHODS
    return smoke(config) if args.smoke else config
