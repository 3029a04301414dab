"""I-JEPA's released recipe in22k_vith14: ViT-H/14, 224 px, 66 epochs of ImageNet-22k (900 of ImageNet-1k).

  python -m experiments.launch --config=experiments/jepa/configs/in22k_vith14.py --workdir=runs/in22k_vith14
  python -m experiments.preflight --config=experiments/jepa/configs/in22k_vith14.py --topology=v5e:16x16

Arguments: smoke; seed=N; batch=N. Data: `folder:/path`, one folder a class, split into train/ and val/ or not
(--config.data.name).
"""

from experiments.jepa.configs.released import IN22K, released


def get_config(arg: str = ""):
    return released(
        arg, name="in22k_vith14", data="folder:imagenet22k", examples=IN22K, size="huge", image=224, patch=14,
        epochs=66.0, warmup=3.0, collate=32, context_cap=112,
    )  # fmt: skip
