"""I-JEPA on rendered scenes: the main job of `make reproduce`.

  python -m experiments.launch --config=experiments/jepa/configs/scenes.py --workdir=runs/scenes

Arguments: smoke; epochs=N; seed=N.
"""

from common.config import parse_arg
from experiments.jepa.configs.base import base, smoke


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False, epochs=8.0, seed=0)
    config = base()
    config.name = "scenes"
    config.data.update(name="scenes", examples=20_000, flip=True)
    config.data.update(crop_scale=(0.6, 1.0), crop_ratio=(1.0, 1.0))
    # What counts is the number of images, and with patches of 8 each teaches more (64 tokens). Small targets, a quiet
    # position table and C-JEPA's terms at their own weight are what so short a run needs (docs/journal.md).
    config.model.update(size="tiny", image=64, patch=8, width=128, depth=4, heads=4, hidden=512)
    config.model.update(
        predictor_width=64, predictor_depth=2, predictor_heads=4, position_scale=0.2
    )
    config.masks.update(target_scale=(0.08, 0.12), context_tokens=24, min_keep=5)
    config.objective.update(vicreg=0.001)
    config.optim.update(lr=1e-3, start_lr=1e-4, final_lr=1e-5, warmup_epochs=args.epochs * 0.1)
    config.optim.update(b2=0.95, final_weight_decay=0.04)
    config.ema.update(start=0.99, final=1.0)
    config.train.update(epochs=args.epochs, batch=64, seed=args.seed, eval_every=1000)
    if args.smoke:
        smoke(config, args, image=32, patch=4)
        config.data.name = "digits"
    return config
