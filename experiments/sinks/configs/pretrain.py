"""Small GPT-NeoX models trained on bytes, with and without a place for attention to go (paper 3.3, Table 3).

  python -m experiments.launch --config=experiments/sinks/configs/pretrain.py --workdir=runs/sink_training
  ... --config.data.text=FOLDER_OF_BOOKS --config.train.steps=20000

Arguments: smoke. The paper's own run (its Table 3) is Pythia-160M on 75 billion tokens; this one is for a laptop.
"""

from common.config import parse_arg
from experiments.shared.settings import to_config
from experiments.sinks.pretrain import Settings


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False)
    config = to_config(Settings)
    config.optim.update(start_lr=0.0, final_lr=1e-4, warmup=30, b2=0.95, clip=1.0)
    config.optim.update(weight_decay=0.1, final_weight_decay=0.1)
    config.train.update(steps=3000, batch=16)
    if args.smoke:
        config.variants = ("vanilla", "token")
        config.data.length = 32
        config.model.update(width=32, depth=2, heads=2, mlp_dim=64, rope_fraction=0.5)
        config.optim.warmup = 0
        config.train.update(steps=3, batch=8, log_every=1, save_every=2)
        config.evaluate.update(cache_size=16, sinks=(0, 1), tokens=100, chunk=32)
    return config
