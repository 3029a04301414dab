"""Figure 4a and 4b: SGD from initial rates 1e-8 to 1e2, towers of height 0 to 5, and ours. About an hour on two cores.

  python -m experiments.launch --config=experiments/metaopt/configs/mnist_towers.py --workdir=runs/mnist_towers

Arguments: smoke; epochs=N; seeds=N. Prepare the data with `python -m common.data prepare mnist`.
"""

from common.config import parse_arg
from experiments.metaopt.configs.base import base, seeds, smoke


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False, epochs=30, seeds=1)
    config = base()
    config.name = "mnist_towers"
    config.grid.update(epochs=args.epochs, seeds=seeds(args))
    towers = [f"tower{h}(sgd)" for h in range(1, 6)]  # 4a
    by_table = [f"table_tower{h}(sgd)" for h in range(1, 4)]  # 4b
    ends = "greedy(sgd)", "adam"
    config.methods = ("auto(sgd)", "sgd", "auto(adam)", *towers, *by_table, *ends)
    return smoke(config, args) if args.smoke else config
