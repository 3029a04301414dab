"""I-JEPA's released recipe in1k_vith16_448: ViT-H/16, 448 px, 300 epochs of ImageNet-1k.

  python -m experiments.launch --config=experiments/jepa/configs/in1k_vith16_448.py --workdir=runs/in1k_vith16_448
  python -m experiments.preflight --config=experiments/jepa/configs/in1k_vith16_448.py --topology=v5e:16x16

Arguments: smoke; seed=N; batch=N. The paper: 81.1 % linear probe (Table 1).
"""

from experiments.jepa.configs.released import IN1K, released


def get_config(arg: str = ""):
    return released(
        arg, name="in1k_vith16_448", data="imagenet2012", examples=IN1K, size="huge", image=448, patch=16,
        epochs=300.0, warmup=40.0, collate=16, context_cap=400,
    )  # fmt: skip
