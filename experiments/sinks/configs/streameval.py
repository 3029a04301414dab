"""StreamEval: what a register held some lines ago, asked again and again in an endless stream (paper 4.3 and Table 7).

  python -m experiments.launch --config=experiments/sinks/configs/streameval.py --workdir=runs/streameval

Arguments: smoke; model=NAME; keys=names or lines. The paper asks 7B chat models for what stood 20 numbered lines back
(keys=lines; digits=5, distances=(20,), queries=100). SmolLM2-135M cannot tell numbered lines apart at all, so it is asked
by names.
"""

from common.config import parse_arg
from experiments.shared.settings import to_config
from experiments.sinks.tasks import StreamEvalSettings


def get_config(arg: str = ""):
    config = to_config(StreamEvalSettings)
    args = parse_arg(arg, smoke=False, model=config.model, keys=config["keys"])
    config.update(model=args.model, keys=args.keys)  # --config.keys would be a method of ConfigDict
    if args.smoke:
        config.update(cache_sizes=(16,), queries=4, every=2, distances=(1, 2), chunk=64)
    return config
