"""The perplexity of long texts under every policy, cache size and number of sinks (paper, Figures 3 and 5, Tables 1, 2, 6).

  python -m experiments.launch --config=experiments/sinks/configs/perplexity.py --workdir=runs/perplexity
  ... perplexity.py:text=~/books,tokens=4000000,policies=sinks,sinks=4 --workdir=runs/four_million

Arguments: smoke; model=NAME; text=WHERE; tokens=N; policies=A+B; cache_sizes=M+N; sinks=M+N.
"""

from common.config import parse_arg
from experiments.shared.settings import to_config
from experiments.sinks.perplexity import Settings


def get_config(arg: str = ""):
    config = to_config(Settings)
    lists = {
        name: "+".join(map(str, config[name])) for name in ("policies", "cache_sizes", "sinks")
    }
    args = parse_arg(arg, smoke=False, model=config.model, text=config.text, tokens=0, **lists)
    if args.smoke:
        config.update(cache_sizes=(16,), sinks=(2,), tokens=100, block=8, chunk=32, save_every=1)
    for name in args.given - {"smoke"}:
        value = getattr(args, name)
        if name in lists:
            value = tuple(type(config[name][0])(item) for item in value.split("+"))
        config[name] = value
    return config
