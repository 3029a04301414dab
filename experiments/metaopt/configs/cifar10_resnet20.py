"""Figure 2: ResNet-20 on CIFAR-10 from 3 rates and 3 momenta, 200 epochs; the step schedule, the paper's towers, and ours.

  python -m experiments.launch --config=experiments/metaopt/configs/cifar10_resnet20.py --workdir=runs/cifar10_resnet20

For accelerators: 390 steps an epoch, 24 runs. A step takes 1.2 CPU seconds on a core of a Xeon, so the argument `small`
trains the four methods of figure 2b (momentum 0.9) from 0.1 alone, on 5,120 images for 10 epochs, in less than an hour on
a core; its errors compare with each other, not with the paper's.

Arguments: smoke; small; epochs=N; seeds=N. Prepare the data with `python -m common.data prepare cifar10`.
"""

from common.config import parse_arg
from experiments.metaopt.configs.base import base, seeds, smoke

FIGURE_2B = ("steps(momentum(0.9))", "momentum(0.9)", "figure2_tower(0.9)", "auto(momentum(0.9))")
FIGURE_2A = tuple(f"{name}({mu})" for name in ("momentum", "figure2_tower") for mu in (0.09, 0.99))


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False, small=False, epochs=0, seeds=1)
    config = base("cifar10")
    config.name = "cifar10_resnet20"
    config.methods = FIGURE_2B if args.small else FIGURE_2B + FIGURE_2A
    config.grid.update(epochs=200, rates=(0.01, 0.1, 1.0), seeds=seeds(args))
    if args.small:
        config.task.examples = 5120
        config.grid.update(epochs=10, rates=(0.1,), save_every=1)
    if "epochs" in args.given:
        config.grid.epochs = args.epochs
    return smoke(config, args) if args.smoke else config
