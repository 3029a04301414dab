"""Table 1 in full: 18 optimizers on MNIST and the towers' reruns, 3 seeds. About an hour on two cores.

  python -m experiments.launch --config=experiments/metaopt/configs/mnist_table1.py --workdir=runs/mnist_table1

Arguments: smoke; seeds=N. Some rows only: --config.rows="('SGD(0.01)','SGD/SGD(0.01)')".
Prepare the data with `python -m common.data prepare mnist`.
"""

from common.config import parse_arg
from experiments.metaopt.configs.base import base, seeds, smoke
from experiments.metaopt.table1 import Settings


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False, seeds=3)
    config = base(settings=Settings)
    config.grid.update(epochs=30, seeds=seeds(args), rates=(1.0,))  # epochs: at most
    if args.smoke:
        smoke(config, args)
        config.rows = ("SGD(0.01)", "SGD/SGD(0.01)")
    return config
