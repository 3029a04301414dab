"""A small model with weights large enough for every part to matter, and masks of unequal lengths.

Legend: B images, M target blocks, C context slots, T target slots.
"""

import jax
import numpy as np

from common.nn.ops import Policy
from jepa.config import ViTConfig

FLOAT32 = Policy(compute="float32", unroll=1)  # scanned: programs that compile quickly
# No two sizes agree, so that no transposed axis can pass unseen.
CONFIG = ViTConfig(
    image=(16, 24),
    patch=4,
    width=36,
    depth=3,
    heads=3,
    hidden=60,
    predictor_width=16,
    predictor_depth=2,
    predictor_heads=4,
)
B, M = 3, 2


def random_params(module, seed):
    """`module`'s parameter tree, filled so that attention is peaked and no bias or scale is idle."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = 0.3 * rng.standard_normal(leaf.shape).astype(np.float32)
        return noise + (path[-1].key == "scale")

    abstract = jax.eval_shape(module.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, abstract)


def images(seed=0):
    """uint8 [B, H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (B, *CONFIG.image, 3), dtype=np.uint8)


def index_lists(seed=0, lengths=((5, 4), (8, 6), (3, 2)), context=(7, 9, 4)):
    """(one context list per image, M target lists per image), without padding."""
    rng = np.random.default_rng(seed)

    def draw(n):
        return np.sort(rng.choice(CONFIG.tokens, n, replace=False)).astype(np.int32)

    return [draw(n) for n in context], [[draw(n) for n in blocks] for blocks in lengths]


def pad(lists, fill=0):
    """Ragged index lists as (int32 [n, longest], valid bool [n, longest])."""
    longest = max(map(len, lists))
    valid = np.array([[slot < len(row) for slot in range(longest)] for row in lists])
    rows = [np.append(row, np.full(longest - len(row), fill)) for row in lists]
    return np.stack(rows).astype(np.int32), valid


def padded_batch(contexts, targets, fill=0):
    """The objective's batch of these index lists; `fill` is what padded slots hold."""
    context, context_valid = pad(contexts, fill)
    flat, flat_valid = pad([block for blocks in targets for block in blocks], fill)
    return {
        "image": images(),
        "context": context,
        "context_valid": context_valid,
        "targets": flat.reshape(B, M, -1),
        "target_valid": flat_valid.reshape(B, M, -1),
    }


def relative_error(got, want):
    """Largest difference, relative to the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return np.abs(got - want).max() / np.abs(want).max()
