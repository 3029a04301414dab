"""A learning rate that finds itself, on scikit-learn's digits: Adam from three initial rates, fixed and learned.

python examples/learned_rate.py
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import metaopt

RATES = (1e-7, 1e-2, 10.0)
STEPS, BATCH, SEED = 400, 64, 0

digits = load_digits()
images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
rows = jnp.arange(len(labels))
test, train = rows[4::5], jnp.delete(rows, rows[4::5])


def logits(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["in"]) @ params["out"]


def loss(params: dict, rows: jax.Array) -> jax.Array:
    scores = logits(params, images[rows])
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels[rows]).mean()


def fit(tx: optax.GradientTransformation) -> tuple[jax.Array, optax.OptState]:
    """The test error in percent after STEPS updates, and the optimizer's state."""

    def step(carry, key):
        params, state = carry
        rows = jax.random.choice(key, train, (BATCH,))
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    k_params, k_steps = jax.random.split(jax.random.key(SEED))
    weights = jax.random.normal(k_params, (2, 64, 64)) / 8
    params = {"in": weights[0], "out": weights[1, :, :10]}
    keys = jax.random.split(k_steps, STEPS)
    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    return 100 * (logits(params, images[test]).argmax(-1) != labels[test]).mean(), state


def main() -> None:
    print("test error from each initial rate\n   rate    fixed  learned   it ends at")
    run = jax.jit(fit, static_argnums=0)
    for rate in RATES:
        fixed, _ = run(optax.adam(rate))
        learned, state = run(metaopt.auto(optax.adam, learning_rate=rate))
        end = optax.tree.get(state, "learning_rate")
        print(f"{rate:7g} {fixed:6.1f} % {learned:6.1f} % {end:9.2g}", flush=True)


if __name__ == "__main__":
    main()
