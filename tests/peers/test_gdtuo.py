"""Every tower type of the original package against `metaopt.paper`, in float64: the same losses and hyperparameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
gdtuo = pytest.importorskip(
    "gradient_descent_the_ultimate_optimizer.gdtuo", reason="needs the extra `peers`"
)

from metaopt import learned, paper
from metaopt.inspect import levels

pytestmark = pytest.mark.peers

STEPS, WIDTH, TOLERANCE = 100, 5, 1e-12


@pytest.fixture(autouse=True)
def float64():
    jax.config.update("jax_enable_x64", True)
    torch.set_default_dtype(torch.float64)
    yield
    jax.config.update("jax_enable_x64", False)
    torch.set_default_dtype(torch.float32)


def data(seed=0):
    rng = np.random.default_rng(seed)
    params = {"fc1.weight": rng.standard_normal((WIDTH, 6)) / 2, "fc1.bias": rng.standard_normal(WIDTH) / 4,
              "fc2.weight": rng.standard_normal((3, WIDTH)) / 2, "fc2.bias": rng.standard_normal(3) / 4}  # fmt: skip
    return params, rng.standard_normal((STEPS, 16, 6)), rng.integers(0, 3, (STEPS, 16))


G = gdtuo
TOWERS = {
    "SGD": (lambda: G.SGD(0.05), lambda: paper.sgd(0.05)),
    "SGD/SGD": (lambda: G.SGD(0.05, optimizer=G.SGD(0.01)), lambda: paper.sgd(0.05, by=paper.sgd(0.01))),
    "SGD/SGD/SGD/SGD": (
        lambda: G.SGD(0.05, optimizer=G.SGD(0.02, optimizer=G.SGD(0.01, optimizer=G.SGD(0.005)))),
        lambda: paper.sgd(0.05, by=paper.sgd(0.02, by=paper.sgd(0.01, by=paper.sgd(0.005)))),
    ),
    "momentum/SGD": (
        lambda: G.SGD(0.05, 0.9, optimizer=G.SGD(1e-3)),
        lambda: paper.sgd(0.05, 0.9, by=paper.sgd(1e-3)),
    ),
    "momentum/SGDPerParam": (
        lambda: G.SGD(0.05, 0.9, optimizer=G.SGDPerParam([("alpha", 1e-3), ("mu", 1e-4)])),
        lambda: paper.sgd(0.05, 0.9, by=paper.sgd_per_param({"learning_rate": 1e-3, "momentum": 1e-4})),
    ),
    "SGDPerParam/SGD": (
        lambda: G.SGDPerParam([("fc1.weight", 0.05), ("fc2.bias", 0.1)], optimizer=G.SGD(1e-2)),
        lambda: paper.sgd_per_param({"fc1.weight": 0.05, "fc2.bias": 0.1}, by=paper.sgd(1e-2)),
    ),
    "SGD/Adam": (lambda: G.SGD(0.05, optimizer=G.Adam(0.01)), lambda: paper.sgd(0.05, by=paper.adam(0.01))),
    "SGD/RMSProp": (
        lambda: G.SGD(0.05, optimizer=G.RMSProp(0.01)),
        lambda: paper.sgd(0.05, by=paper.rmsprop(0.01)),
    ),
    "AdaGrad/SGD": (
        lambda: G.AdaGrad(0.05, optimizer=G.SGD(0.01)),
        lambda: paper.adagrad(0.05, by=paper.sgd(0.01)),
    ),
    "AdaGrad/AdaGrad": (
        lambda: G.AdaGrad(0.05, optimizer=G.AdaGrad(0.01)),
        lambda: paper.adagrad(0.05, by=paper.adagrad(0.01)),
    ),
    "RMSProp/SGD": (
        lambda: G.RMSProp(0.01, 0.9, optimizer=G.SGD(1e-3)),
        lambda: paper.rmsprop(0.01, 0.9, by=paper.sgd(1e-3)),
    ),
    "RMSProp/RMSProp": (
        lambda: G.RMSProp(0.01, optimizer=G.RMSProp(1e-4)),
        lambda: paper.rmsprop(0.01, by=paper.rmsprop(1e-4)),
    ),
    "RMSPropAlpha/RMSPropAlpha": (
        lambda: G.RMSPropAlpha(0.01, optimizer=G.RMSPropAlpha(1e-4)),
        lambda: paper.rmsprop(0.01, learn_decay=False, by=paper.rmsprop(1e-4, learn_decay=False)),
    ),
    "Adam/SGD": (
        lambda: G.Adam(0.01, optimizer=G.SGD(1e-5)),
        lambda: paper.adam(0.01, by=paper.sgd(1e-5)),
    ),
    "Adam/SGDPerParam": (
        lambda: G.Adam(0.01, optimizer=G.SGDPerParam([("alpha", 1e-4), ("beta1", 1e-2), ("beta2", 1e-2)])),
        lambda: paper.adam(0.01, by=paper.sgd_per_param({"learning_rate": 1e-4, "b1": 1e-2, "b2": 1e-2})),
    ),
    "Adam/Adam": (
        lambda: G.Adam(0.01, optimizer=G.Adam(1e-3)),
        lambda: paper.adam(0.01, by=paper.adam(1e-3)),
    ),
    "Adam/Adam/Adam": (
        lambda: G.Adam(0.01, optimizer=G.Adam(1e-3, optimizer=G.Adam(1e-3))),
        lambda: paper.adam(0.01, by=paper.adam(1e-3, by=paper.adam(1e-3))),
    ),
    "AdamBaydin/Adam": (
        lambda: G.AdamBaydin(0.01, optimizer=G.Adam(1e-3)),
        lambda: paper.adam_baydin(0.01, by=paper.adam(1e-3)),
    ),
}  # fmt: skip
NAMES = {"learning_rate": "alpha", "momentum": "mu", "b1": "beta1", "b2": "beta2", "decay": "gamma"}


def original(optimizer):
    """Losses, and every level's raw hyperparameters by the end."""
    params, xs, ys = data()
    module = torch.nn.Sequential()
    module.fc1, module.act, module.fc2 = (
        torch.nn.Linear(6, WIDTH),
        torch.nn.Tanh(),
        torch.nn.Linear(WIDTH, 3),
    )
    module.load_state_dict({k: torch.from_numpy(v) for k, v in params.items()})
    wrapper = gdtuo.ModuleWrapper(module, optimizer=optimizer)
    wrapper.initialize()
    losses = []
    for x, y in zip(xs, ys):
        wrapper.begin()
        loss = torch.nn.functional.cross_entropy(
            wrapper.forward(torch.from_numpy(x)), torch.from_numpy(y)
        )
        wrapper.zero_grad()
        loss.backward(create_graph=True)
        wrapper.step()
        losses.append(loss.item())
    found, level = [], optimizer
    while not isinstance(level, gdtuo.NoOpOptimizer):
        found.append({k: float(v.detach()) for k, v in level.parameters.items()})
        level = level.optimizer
    return losses, found


def ours(tx):
    params, xs, ys = data()
    params = jax.tree.map(jnp.asarray, params)

    def loss(p, x, y):
        hidden = jnp.tanh(x @ p["fc1.weight"].T + p["fc1.bias"])
        logits = hidden @ p["fc2.weight"].T + p["fc2.bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def run(params, state):
        def step(carry, batch):
            params, state = carry
            now, grads = jax.value_and_grad(loss)(params, *batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), now

        return jax.lax.scan(step, (params, state), (jnp.asarray(xs), jnp.asarray(ys)))

    (_, state), losses = run(params, tx.init(params))
    return losses, state


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name", TOWERS)
def test_a_hundred_steps_agree(name):
    theirs, mine = (make() for make in TOWERS[name])
    want, want_levels = original(theirs)
    losses, state = ours(mine)
    np.testing.assert_allclose(losses, want, rtol=TOLERANCE, atol=TOLERANCE)
    if "/" not in name:
        return
    assert learned(state)  # at least one level learns
    for level, expected in zip(levels(state), want_levels):
        for key, raw in level.raw.items():
            theirs_name = NAMES.get(key, f"{key}_alpha")
            assert float(raw) == pytest.approx(
                expected[theirs_name], rel=TOLERANCE, abs=TOLERANCE
            ), key
