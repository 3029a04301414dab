"""I-JEPA on MNIST (60,000 digits of 28x28, shown as 32x32), a small ViT with patch 4.

  python -m experiments.launch --config=experiments/jepa/configs/mnist.py --workdir=runs/mnist

Arguments: smoke; epochs=N; seed=N. Prepare the data with `python -m common.data prepare mnist`.
"""

from common.config import parse_arg
from experiments.jepa.configs.base import base, smoke


def get_config(arg: str = ""):
    args = parse_arg(arg, smoke=False, epochs=3.0, seed=0)
    config = base()
    config.name = "mnist"
    config.data.update(name="mnist", examples=60_000, crop_scale=(0.6, 1.0))
    config.model.update(size="tiny", image=32, patch=4, depth=6, predictor_depth=4)
    config.optim.update(start_lr=1e-4, final_lr=1e-5, warmup_epochs=args.epochs * 0.1)
    config.optim.update(final_weight_decay=0.04)
    config.ema.update(start=0.99, final=1.0)
    config.train.update(epochs=args.epochs, batch=128, seed=args.seed, log_every=20, eval_every=500)
    if args.smoke:
        smoke(config, args, image=32, patch=4)
        config.data.name = "digits"
    return config
