"""StreamEval: what a register held some lines ago, asked again and again in an endless stream (paper 4.3 and Table 7).

  python -m experiments.launch --config=experiments/sinks/configs/streameval.py --workdir=runs/streameval

Arguments: smoke; model=NAME; keys=names or lines. The paper asks 7B chat models for what stood 20 numbered lines back
(keys=lines; digits=5, distances=(20,), queries=100). SmolLM2-135M cannot tell numbered lines apart at all, so it is asked
by names.
"""

from ml_collections import ConfigDict

from common.config import parse_arg


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False, model="smollm2-135m", keys="names")
    return ConfigDict(
        {
            "job": "sinks_streameval",
            "name": "streameval",
            "model": args.model,
            "policies": ("sinks", "window"),
            "cache_sizes": (16,) if args.smoke else (512, 1024),  # S + R
            "sinks": 4,
            "samples": 2,  # texts, streamed as rows of one batch
            "queries": 4 if args.smoke else 60,  # in each text
            "every": 2 if args.smoke else 4,  # lines between two questions
            "distances": (1, 2) if args.smoke else (1, 2, 5, 10, 20, 40),  # lines back, in turn
            "digits": 3,
            "keys": args.keys,  # an argument: --config.keys would be a method of ConfigDict
            "chunk": 64 if args.smoke else 512,
            "seed": 0,
        }
    )
