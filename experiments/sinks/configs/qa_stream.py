"""Multiple-choice questions as one endless stream, as in the paper's Table 5, against each question alone.

  python -m experiments.launch --config=experiments/sinks/configs/qa_stream.py --workdir=runs/qa
  ... --config.questions=ARC-Easy-Test.jsonl

Arguments: smoke; model=NAME.
"""

from ml_collections import ConfigDict

from common.config import parse_arg


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False, model="smollm2-135m")
    return ConfigDict(
        {
            "job": "sinks_qa_stream",
            "name": "qa_stream",
            "model": args.model,
            "questions": "embedded",  # or a JSONL file, ARC's own among them
            "policies": ("alone", "sinks", "window"),
            "cache_sizes": (64,) if args.smoke else (256, 1024),  # S + R
            "sinks": 4,
            "samples": 1,  # streams, each in an order of its own
            "count": 4 if args.smoke else 148,  # questions in each
            "chunk": 64 if args.smoke else 512,
            "seed": 0,
        }
    )
