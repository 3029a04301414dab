"""`torch.optim.AdamW` under the released I-JEPA loop's rules, against our one optax transformation."""

import jax
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `peers`")

from common.optim import OptimSpec, adamw

pytestmark = pytest.mark.peers

STEPS = 20
SPEC = OptimSpec(lr=0.03, start_lr=0.005, final_lr=1e-4, warmup=5)


def cosine(start, final, progress):
    return final + (start - final) * (1 + np.cos(np.pi * progress)) / 2


def test_twenty_steps_agree_with_torch():
    """Two groups (kernels decay, biases and scales do not), learning rate and decay set before each step from a count
    that is raised before it is read (docs/papers/ijepa.md 1.6)."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (6, 5), "bias": (5,), "scale": (5,), "mask_token": (6,)}
    params = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    gradients = [
        {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
        for _ in range(STEPS)
    ]

    peers = {k: torch.nn.Parameter(torch.from_numpy(p.copy())) for k, p in params.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [peers["kernel"], peers["mask_token"]], "decays": True},
            {"params": [peers["bias"], peers["scale"]], "decays": False},
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    for step, gradient in enumerate(gradients, start=1):
        for group in optimizer.param_groups:
            ramp = SPEC.start_lr + (SPEC.lr - SPEC.start_lr) * step / SPEC.warmup
            fall = cosine(SPEC.lr, SPEC.final_lr, (step - SPEC.warmup) / (STEPS - SPEC.warmup))
            group["lr"] = ramp if step < SPEC.warmup else fall
            group["weight_decay"] = cosine(0.04, 0.4, step / STEPS) if group["decays"] else 0.0
        for name, parameter in peers.items():
            parameter.grad = torch.from_numpy(gradient[name])
        optimizer.step()

    ours = adamw(SPEC, STEPS)

    @jax.jit
    def update(params, state, gradient):
        updates, state = ours.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = ours.init(params)
    for gradient in gradients:
        params, state = update(params, state, gradient)
    for name, parameter in peers.items():
        # float32's 1 - b2^t is good to 6e-5 in the first steps, each as long as the learning rate
        want = parameter.detach().numpy()
        np.testing.assert_allclose(params[name], want, rtol=1e-6, atol=1e-4 * SPEC.lr, err_msg=name)
