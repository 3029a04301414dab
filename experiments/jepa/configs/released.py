"""What the four released ImageNet recipes have in common (docs/papers/ijepa.md 1.8): not a config by itself."""

from common.config import parse_arg
from experiments.jepa.configs.base import base, smoke

IN1K, IN22K = 1_281_167, 14_197_122  # images


def released(
    arg: str, *, name: str, data: str, examples: int, size: str, image: int, patch: int, epochs: float,
    warmup: float, collate: int, context_cap: int,
):  # fmt: skip
    """A released recipe: global batch 2048, the paper's masks collated as on one GPU of the original run.

    Arguments of the config: smoke; seed=N; batch=N.
    """
    args = parse_arg(arg, smoke=False, seed=0, batch=2048)
    config = base()
    config.name = name
    config.data.update(name=data, examples=examples, eval_resize=image * 256 // 224, workers=8)
    config.data.test_split = "validation"
    config.model.update(size=size, image=image, patch=patch)
    config.masks.update(mode="paper", collate=collate, context_tokens=context_cap)
    config.optim.update(warmup_epochs=warmup)
    config.train.update(epochs=epochs, batch=args.batch, seed=args.seed)
    config.train.update(log_every=50, eval_every=2500, save_every=1000)
    config.mesh.update(replica=4, fsdp=-1)  # 64-way FSDP on 256 chips: every width divides by it
    config.policy.update(remat=True)
    if args.smoke:
        smoke(
            config, args, image=96, patch=8
        )  # the released rules need targets of more than 10 patches
        config.mesh.update(replica=1)
        config.data.update(name="digits", test_split="test", eval_resize=None, workers=0)
    return config
