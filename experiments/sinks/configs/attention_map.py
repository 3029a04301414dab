"""Where a model's attention goes: every head's map, and the share of the first tokens (paper, Figures 2 and 7).

  python -m experiments.launch --config=experiments/sinks/configs/attention_map.py --workdir=runs/attention

Arguments: smoke; model=NAME; text=WHERE. About a minute with SmolLM2-135M on two cores.
"""

from common.config import parse_arg
from experiments.shared.settings import to_config
from experiments.sinks.attention_map import Settings


def get_config(arg: str = ""):
    config = to_config(Settings)
    args = parse_arg(arg, smoke=False, model=config.model, text=config.text)
    config.update(model=args.model, text=args.text)
    if args.smoke:
        config.update(texts=2, tokens=24)
    return config
