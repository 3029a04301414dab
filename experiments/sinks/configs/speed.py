"""Milliseconds and bytes per token against cache size and policy (paper, Figure 10, and the baseline users ask for: window).

  python -m experiments.launch --config=experiments/sinks/configs/speed.py --workdir=runs/speed

Arguments: smoke; model=NAME. Some minutes with SmolLM2-135M on two cores, most of them for re-computation.
"""

from common.config import parse_arg
from experiments.shared.settings import to_config
from experiments.sinks.speed import Settings


def get_config(arg: str = ""):
    config = to_config(Settings)
    args = parse_arg(arg, smoke=False, model=config.model)
    config.update(model=args.model)
    if args.smoke:
        config.update(cache_sizes=(16, 32), tokens=3)
    return config
