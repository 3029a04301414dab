"""I-JEPA on scikit-learn's digits: features of one digit move together without any label.

    python examples/ijepa_digits.py

Pretrains a small Vision Transformer on 8x8 images, and counts how many test images get the right digit from their nearest
neighbours in feature space. Images as simple as these need no features: by their pixels it is 98 %.
"""

import jax
import jax.numpy as jnp
import numpy as np

from common.augment import normalize
from common.data import open_source
from common.metrics import compute
from common.optim import OptimSpec, adamw
from common.state import init_state
from common.train_step import make_train_step
from jepa.config import vit
from jepa.masks import MaskSpec
from jepa.objective import ObjectiveSpec
from jepa.probe import knn
from jepa.recipe import AddMasks, EmaSpec, IJepa

STEPS, BATCH = 300, 64
SIZES = {"width": 64, "depth": 4, "heads": 4, "hidden": 256, "position_scale": 0.2}
PREDICTOR = {"predictor_width": 32, "predictor_depth": 2, "predictor_heads": 2}


def main() -> None:
    train, test = (list(open_source("digits", split)) for split in ("train", "test"))
    images, labels, test_images, test_labels = (
        np.stack([r[k] for r in part]) for part in (train, test) for k in ("image", "label")
    )
    model = vit("tiny", image=8, patch=2, **SIZES, **PREDICTOR)
    masks = MaskSpec(grid=model.grid, min_keep=2, context_tokens=6)
    tx = adamw(OptimSpec(lr=1e-3, warmup=STEPS // 10, final_weight_decay=0.04), STEPS)
    objective = ObjectiveSpec(vicreg=0.01)  # C-JEPA's terms keep short runs from collapse
    recipe = IJepa(model, masks, tx, EmaSpec(0.99, 1.0).schedule(STEPS), objective)
    features = jax.jit(lambda params, x: recipe.encoder(params, normalize(x)).mean(1))

    def report(what: str, target: dict) -> None:
        known, asked = features(target, images), features(target, test_images)
        right = knn(known, labels, asked, test_labels, num_classes=10)
        print(f"{what}: {100 * right:.1f} % of test images right", flush=True)

    state, add_masks = init_state(recipe, jax.random.key(0)), AddMasks(masks, seed=0)
    report("untrained", state.extra["target"])
    step = jax.jit(make_train_step(recipe), donate_argnums=0)
    for i in range(STEPS):
        rows = np.arange(i * BATCH, (i + 1) * BATCH)
        batch = add_masks({"image": images[rows % len(images)]}, rows)
        state, metrics = step(state, batch, jnp.int32(i))
        if (i + 1) % 100 == 0 or i + 1 == STEPS:
            report(f"step {i + 1}, loss {compute(metrics)['loss']:.3f}", state.extra["target"])


if __name__ == "__main__":
    main()
