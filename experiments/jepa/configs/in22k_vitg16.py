"""I-JEPA's released recipe in22k_vitg16: ViT-G/16, 224 px, 44 epochs of ImageNet-22k (600 of ImageNet-1k).

  python -m experiments.launch --config=experiments/jepa/configs/in22k_vitg16.py --workdir=runs/in22k_vitg16
  python -m experiments.preflight --config=experiments/jepa/configs/in22k_vitg16.py --topology=v5e:16x16

Arguments: smoke; seed=N; batch=N. Data: `folder:/path`, one folder a class, split into train/ and val/ or not
(--config.data.name).
"""

from experiments.jepa.configs.released import IN22K, released


def get_config(arg: str = ""):
    return released(
        arg, name="in22k_vitg16", data="folder:imagenet22k", examples=IN22K, size="giant", image=224, patch=16,
        epochs=44.0, warmup=3.0, collate=16, context_cap=96,
    )  # fmt: skip
