"""AdamW does what its specification says, step by step, against a version in plain NumPy."""

import jax
import numpy as np
import optax
import pytest

from common.optim import OptimSpec, adamw, decays

STEPS = 6
SPEC = OptimSpec(lr=0.1, start_lr=0.02, final_lr=0.01, warmup=2)


def tree(seed):
    """The kinds of leaf a model has: stacked and single kernels, biases, scales; a mask token."""
    rng = np.random.default_rng(seed)
    shapes = {
        "blocks": {
            "norm1": {"scale": (3, 4), "bias": (3, 4)},
            "mlp": {"up": {"kernel": (3, 4, 5), "bias": (3, 5)}},
        },
        "mask_token": (4,),
        "norm": {"scale": (4,), "bias": (4,)},
    }
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_only_kernels_and_the_mask_token_decay():
    assert decays(tree(0)) == {
        "blocks": {
            "norm1": {"scale": False, "bias": False},
            "mlp": {"up": {"kernel": True, "bias": False}},
        },
        "mask_token": True,
        "norm": {"scale": False, "bias": False},
    }


def cosine(start, final, progress):
    return final + (start - final) * (1 + np.cos(np.pi * progress)) / 2


def adamw_numpy(params, gradients, decay_mask, total=STEPS):
    """Decoupled decay times the learning rate, then Adam's step; schedules read at updates 1, 2, ..."""
    first = second = 0.0
    for t, gradient in enumerate(gradients, start=1):
        ramp = SPEC.start_lr + (SPEC.lr - SPEC.start_lr) * t / SPEC.warmup
        fall = cosine(SPEC.lr, SPEC.final_lr, (t - SPEC.warmup) / (total - SPEC.warmup))
        lr = ramp if t < SPEC.warmup else fall
        decay = decay_mask * cosine(SPEC.weight_decay, SPEC.final_weight_decay, t / total)
        first = SPEC.b1 * first + (1 - SPEC.b1) * gradient
        second = SPEC.b2 * second + (1 - SPEC.b2) * gradient**2
        adam = first / (1 - SPEC.b1**t) / (np.sqrt(second / (1 - SPEC.b2**t)) + SPEC.eps)
        params = params - lr * decay * params - lr * adam
    return params


def run(spec, gradients, steps=STEPS):
    optimizer, params = adamw(spec, steps), tree(0)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_matches_numpy_with_schedules_and_mask():
    gradients = [tree(seed) for seed in range(1, STEPS + 1)]

    def check(got, start, mask, *gradients):
        # 1 - b2^t in float32 is good to 6e-5 at first, its root to 3e-5: of steps as long as lr.
        want = adamw_numpy(start.astype(np.float64), gradients, mask)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-4 * SPEC.lr)

    jax.tree.map(check, run(SPEC, gradients), tree(0), decays(tree(0)), *gradients)


def test_schedules_stretch_beyond_the_run():
    stretched = OptimSpec(schedule_scale=1.25)
    lr, decay = stretched.lr_schedule(100), stretched.weight_decay_schedule(100)
    assert float(lr(124)) == np.float32(stretched.final_lr) < float(lr(99))
    assert float(decay(124)) == np.float32(0.4) > float(decay(99))


@pytest.mark.slow
def test_clipping_bounds_the_whole_gradient_and_is_off_by_default():
    """Adam hides one common factor, so the second of two gradients is made the large one."""
    gradients = [tree(1), jax.tree.map(lambda g: 100 * g, tree(2))]
    norm = [float(optax.tree.norm(g)) for g in gradients]
    by_hand = [jax.tree.map(lambda g, n=n: g * min(1, 0.5 / n), g) for g, n in zip(gradients, norm)]
    clipped = run(OptimSpec(clip=0.5), gradients)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(close, clipped, run(OptimSpec(), by_hand))
    with pytest.raises(AssertionError):
        jax.tree.map(close, clipped, run(OptimSpec(), gradients))


def test_a_warmup_that_does_not_fit_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"optim.warmup=7 .* run of 6: lower it, or train longer"):
        adamw(OptimSpec(warmup=7), STEPS)


@pytest.mark.parametrize(
    "bad", [{"lr": 0.0}, {"start_lr": -1.0}, {"final_lr": -1.0}, {"schedule_scale": 0.5}]
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="optim"):
        OptimSpec(**bad)
