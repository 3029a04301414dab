"""Multiple-choice questions as one endless stream, as in the paper's Table 5, against each question alone.

  python -m experiments.launch --config=experiments/sinks/configs/qa_stream.py --workdir=runs/qa
  ... --config.questions=ARC-Easy-Test.jsonl

Arguments: smoke; model=NAME.
"""

from common.config import parse_arg
from experiments.shared.settings import to_config
from experiments.sinks.tasks import QASettings


def get_config(arg: str = ""):
    config = to_config(QASettings)
    args = parse_arg(arg, smoke=False, model=config.model)
    config.update(model=args.model)
    if args.smoke:
        config.update(cache_sizes=(64,), count=4, chunk=64)
    return config
