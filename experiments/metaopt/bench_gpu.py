"""What learned rates cost on a GPU: an update of AdamW, of `auto(AdamW)`, of a tower of two, and the peers' (row 14).

  python -m experiments.metaopt.bench_gpu [--minutes=8] [--out=PATH] [--smoke]

Parameters lie in 5 arrays (bandwidth decides) or 200 (launches do). Gradients are fixed random numbers: only the update is
timed, ten in one program. AdamW moves 28 bytes a parameter, what else an optimizer keeps is read and written once more. The
real steps are a GPT of 10 million parameters and ResNet-20; they need the `grain` package.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.metaopt.bench import contenders
from experiments.shared.bench_gpu import (
    Cell,
    Contender,
    checked,
    compiled,
    repeated,
    run_part,
    torch_contender,
    torch_device,
)

UPDATES = 10  # a program
OURS = ("adamw", "auto", "level2")


def arrays(parameters: int, count: int) -> list[np.ndarray]:
    """`count` random matrices of `parameters` numbers together, all of one shape."""
    rows = max(1, round((parameters / count) ** 0.5))
    shape = rows, max(1, parameters // count // rows)
    return [np.random.default_rng(i).standard_normal(shape, np.float32) for i in range(count)]


def update(name: str, parameters: int, count: int) -> Contender:
    """Updates by one of `bench.contenders`."""
    tx, params = contenders()[name], [jnp.asarray(x) for x in arrays(parameters, count)]
    grads = [0.01 * x for x in params]

    def once(held, grads):
        params, state = held
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return _stepping(once, params, tx, grads, UPDATES)


def _stepping(once: Callable, params: Any, tx: Any, inputs: Any, updates: int) -> Contender:
    """`once(held, inputs)` `updates` times in one program, with its bound in bytes: AdamW's, and more state once more."""

    def many(held, inputs):
        return jax.lax.scan(lambda h, _: (once(h, inputs), None), held, None, length=updates)

    held = params, jax.jit(tx.init)(params)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    step, facts = compiled(many, held, inputs, donate=(0,))
    facts["state_bytes"] = float(size(held[1]))
    moved = 3 * size(params) + 2 * size(held[1])
    return Contender(repeated(lambda h: step(h, inputs), held), updates, nbytes=moved, facts=facts)


def torch_adamw(parameters: int, count: int, **options: Any) -> Contender:
    import torch  # pyright: ignore[reportMissingImports]  # extra: peers

    params = [torch.tensor(x, device=torch_device()) for x in arrays(parameters, count)]
    for p in params:
        p.requires_grad_().grad = 0.01 * p.detach()
    optimizer = torch.optim.AdamW(params, lr=1e-3, **options)
    run = lambda: [optimizer.step() for _ in range(UPDATES)]  # noqa: E731
    return torch_contender(run, steps=UPDATES, nbytes=28 * sum(p.numel() for p in params))


def original(parameters: int, count: int) -> Contender:
    """The paper's package, Adam by SGD, on a loss whose gradient is as cheap as ours: half the square of the parameters."""
    import torch  # pyright: ignore[reportMissingImports]  # extra: peers
    from gradient_descent_the_ultimate_optimizer import gdtuo  # pyright: ignore[reportMissingImports]  # extra: peers

    module = torch.nn.ParameterList([torch.tensor(x) for x in arrays(parameters, count)])
    module = module.to(torch_device())
    wrapped = gdtuo.ModuleWrapper(module, optimizer=gdtuo.Adam(1e-3, optimizer=gdtuo.SGD(1e-5)))
    wrapped.initialize()

    def run() -> None:
        for _ in range(UPDATES):
            wrapped.begin()
            loss = 0.005 * torch.stack([(p * p).sum() for p in module.parameters()]).sum()
            wrapped.zero_grad()
            loss.backward(create_graph=True)
            wrapped.step()

    return torch_contender(run, steps=UPDATES)


def real(name: str, net: str, smoke: bool) -> Contender:
    """Whole training steps of a GPT or a ResNet on fixed random data."""
    rng, key = np.random.default_rng(0), jax.random.key(0)
    if net == "gpt":
        from experiments.metaopt.tasks.gpt import GPT

        length, batch = (16, 2) if smoke else (256, 128)
        model = GPT(64, length, *((32, 1) if smoke else (256, 12)))
        x = jnp.asarray(rng.integers(0, 64, (batch, length)), jnp.int32)
        y, init, logits = jnp.roll(x, -1, 1), model.init, model
    else:
        from common.nn.module import define
        from experiments.metaopt.tasks.resnet import ResNet

        module = define(lambda rngs: ResNet(8 if smoke else 20, 4 if smoke else 16, 3, 10, rngs))
        batch = 4 if smoke else 512
        x = jnp.asarray(rng.standard_normal((batch, 32, 32, 3)), jnp.float32)
        y, init = jnp.asarray(rng.integers(0, 10, batch)), module.init
        logits = lambda params, x: module(params, x)[0]  # noqa: E731
    tx, params = contenders()[name], init(key)

    def loss(params, data):
        out = logits(params, data[0])
        return optax.softmax_cross_entropy_with_integer_labels(out, data[1]).mean()

    def once(held, data):
        params, state = held
        updates, state = tx.update(jax.grad(loss)(params, data), state, params)
        return optax.apply_updates(params, updates), state

    contender = _stepping(once, params, tx, (x, y), 1 if smoke else UPDATES)
    contender.items, contender.nbytes = x.size if net == "gpt" else len(x), 0.0
    return contender


def check() -> Contender:
    """Three updates of a tower against the CPU's."""
    tx, params = contenders()["level2"], [jnp.asarray(x) for x in arrays(2_000, 4)]

    def three(params: Any):
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update([0.01 * x for x in params], state, params)
            params = optax.apply_updates(params, updates)
        return params

    return checked(three, three, 1e-5, params)


def cells(smoke: bool) -> list[Cell]:
    # by importance: a run that is cut keeps the best
    sizes = ((100e6, 5), (100e6, 200), (10e6, 200), (10e6, 5), (1e6, 200), (1e6, 5))
    found = [] if smoke else [Cell("check", 20, {"level2": check})]
    for parameters, count in ((2e3, 4),) if smoke else sizes:
        size = int(parameters), count
        turns = {n: partial(update, n, *size) for n in (OURS[:2] if smoke else OURS)}
        turns |= {"torch_fused": partial(torch_adamw, *size, fused=True)}
        turns |= {"gdtuo": partial(original, *size)}
        found.append(Cell(f"update {parameters / 1e6:g}M in {count}", 60, turns))
    for net in ("gpt", "resnet"):
        names = OURS[:1] if smoke else OURS
        found.append(Cell(f"step {net}", 60, {n: partial(real, n, net, smoke) for n in names}))
    return found


main = partial(run_part, "bench_gpu_metaopt", cells)

if __name__ == "__main__":
    sys.exit(main())
