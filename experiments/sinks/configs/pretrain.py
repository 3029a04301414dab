"""Small GPT-NeoX models trained on bytes, with and without a place for attention to go (paper 3.3, Table 3).

  python -m experiments.launch --config=experiments/sinks/configs/pretrain.py --workdir=runs/sink_training
  ... --config.data.text=FOLDER_OF_BOOKS --config.train.steps=20000

Arguments: smoke. The paper's own run (its Table 3) is Pythia-160M on 75 billion tokens; this one is for a laptop.
"""

from ml_collections import ConfigDict

from common.config import parse_arg


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False)
    config = ConfigDict(
        {
            "job": "sinks_pretrain",
            "name": "pretrain",
            "variants": ("vanilla", "zero", "logit", "token"),  # or tokens2
            "data": {
                "text": "python-topics",  # "embedded", a file, or a folder of .txt; read as bytes
                "length": 256,  # bytes of a sample
                "held_out": 0.1,  # the last part of each text, for evaluation
            },
            "model": {"width": 192, "depth": 6, "heads": 6, "mlp_dim": 768, "rope_fraction": 0.25},
            "optim": {
                "lr": 1e-3,
                "start_lr": 0.0,
                "final_lr": 1e-4,
                "warmup": 30,
                "weight_decay": 0.1,
                "final_weight_decay": 0.1,
                "b2": 0.95,
                "clip": 1.0,
                "auto": False,  # learn rate and weight decay on the way, from lr and weight_decay
            },
            "compute": "float32",
            "train": {
                "steps": 3000,
                "batch": 16,
                "seed": 0,
                "log_every": 10,
                "eval_every": 0,
                "save_every": 500,
            },
            "mesh": {"replica": 1, "fsdp": -1, "tensor": 1, "mode": "auto"},
            "evaluate": {
                "cache_size": 256,  # S + R of the streams
                "sinks": (0, 1, 2, 4),
                "tokens": 20_000,  # of the held-out text
                "chunk": 512,
            },
        }
    )
    if args.smoke:
        config.variants = ("vanilla", "token")
        config.data.length = 32
        config.model.update(width=32, depth=2, heads=2, mlp_dim=64, rope_fraction=0.5)
        config.optim.warmup = 0
        config.train.update(steps=3, batch=8, log_every=1, save_every=2)
        config.evaluate.update(cache_size=16, sinks=(0, 1), tokens=100, chunk=32)
    return config
