"""Every setting of the I-JEPA job, for the configs to change; the released values (docs/papers/ijepa.md 1.6 to 1.8)."""

from types import SimpleNamespace

from ml_collections import ConfigDict

from experiments.jepa.settings import Settings
from experiments.shared.settings import to_config


def base() -> ConfigDict:
    """Every setting of job "jepa_pretrain" at its default, the released recipe's; configs change what differs."""
    return to_config(Settings)


def smoke(config: ConfigDict, args: SimpleNamespace, *, image: int, patch: int) -> ConfigDict:
    """Shrinks a config to a few steps that take seconds on a laptop, with the same code paths.

    What the argument itself says of epochs and batch stays.
    """
    config.model.update(image=image, patch=patch, width=32, depth=2, heads=2, hidden=64)
    config.model.update(predictor_width=16, predictor_depth=1, predictor_heads=2)
    if "epochs" not in args.given:
        config.train.update(epochs=None, steps=3)
    if "batch" not in args.given:
        config.train.batch = 8
    config.train.accumulate = 1
    config.train.update(log_every=1, eval_every=2, save_every=2)
    config.optim.warmup_epochs = 0.0
    config.masks.update(collate=8, context_tokens=None)
    config.mesh.update(replica=1, fsdp=-1, tensor=1)
    config.probe.update(
        knn_train=32, knn_test=16, train_examples=64, test_examples=32, epochs=2, batch=16
    )
    return config
