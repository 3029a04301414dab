"""Where a model's attention goes: every head's map, and the share of the first tokens (paper, Figures 2 and 7).

  python -m experiments.launch --config=experiments/sinks/configs/attention_map.py --workdir=runs/attention

Arguments: smoke; model=NAME; text=WHERE. About a minute with SmolLM2-135M on two cores.
"""

from ml_collections import ConfigDict

from common.config import parse_arg


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False, model="smollm2-135m", text="embedded")
    return ConfigDict(
        {
            "job": "sinks_attention_map",
            "name": "attention_map",
            "model": args.model,  # a name, a .gguf file, a safetensors folder or owner/name
            "text": args.text,  # "embedded", "python-topics", a file, or a folder of .txt
            "texts": 2 if args.smoke else 16,  # stretches of text, taken evenly from all of it
            "tokens": 24 if args.smoke else 128,  # of each
            "bos": False,  # whether each begins with the model's first token
            "sinks": 0,  # of the stream; dense attention where recent is 0
            "recent": 0,
        }
    )
