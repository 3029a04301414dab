"""I-JEPA's released recipe in1k_vith14: ViT-H/14, 224 px, 300 epochs of ImageNet-1k.

  python -m experiments.launch --config=experiments/jepa/configs/in1k_vith14.py --workdir=runs/in1k_vith14
  python -m experiments.preflight --config=experiments/jepa/configs/in1k_vith14.py --topology=v5e:16x16

Arguments: smoke; seed=N; batch=N. The paper: 79.3 % linear probe (Table 1).
"""

from experiments.jepa.configs.released import IN1K, released


def get_config(arg: str = ""):
    return released(
        arg, name="in1k_vith14", data="imagenet2012", examples=IN1K, size="huge", image=224, patch=14,
        epochs=300.0, warmup=40.0, collate=128, context_cap=104,
    )  # fmt: skip
