"""Milliseconds and bytes per token against cache size and policy (paper, Figure 10, and the baseline users ask for: window).

  python -m experiments.launch --config=experiments/sinks/configs/speed.py --workdir=runs/speed

Arguments: smoke; model=NAME. Some minutes with SmolLM2-135M on two cores, most of them for re-computation.
"""

from ml_collections import ConfigDict

from common.config import parse_arg


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False, model="smollm2-135m")
    return ConfigDict(
        {
            "job": "sinks_speed",
            "name": "speed",
            "model": args.model,  # a name, a .gguf file, a safetensors folder or owner/name
            "dtype": "float32",  # of weights and cache
            "batch": 1,  # streams side by side
            "sinks": 4,
            "cache_sizes": (16, 32) if args.smoke else (256, 512, 1024, 2048),  # S + R
            "policies": ("window", "sinks", "sinks_int8", "recompute"),
            "tokens": 3
            if args.smoke
            else 20,  # timed, of each, or ten seconds of them; medians are reported
        }
    )
