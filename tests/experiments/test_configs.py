"""Every config builds at full size, and its smoke version trains three steps."""

import importlib
import pkgutil

import jax
import pytest

import experiments.jepa.configs as folder
from experiments.jepa import pretrain as jepa_pretrain
from experiments.jepa.settings import resolve
from experiments.shared.run import Run
from experiments.sinks.configs import perplexity

CONFIGS = sorted(
    name for _, name, _ in pkgutil.iter_modules(folder.__path__) if name not in ("base", "released")
)
RELEASED = {  # parameters in millions, docs/papers/ijepa.md 1.3 and 1.4: encoder, predictor
    "in1k_vith14": (630.43, 22.28),
    "in1k_vith16_448": (630.66, 22.28),
    "in22k_vith14": (630.43, 22.28),
    "in22k_vitg16": (1011.09, 29.48),
}


def config(name: str, arg: str = "") -> dict:
    module = importlib.import_module(f"experiments.jepa.configs.{name}")
    return module.get_config(arg).to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_full_size_builds(name):
    settings = resolve(config(name))
    assert settings.name == name
    assert settings.train.steps > settings.optim.warmup
    if name in RELEASED:
        abstract = jax.eval_shape(settings.recipe.init, jax.random.key(0))
        count = {k: sum(p.size for p in jax.tree.leaves(v)) / 1e6 for k, v in abstract.items()}
        assert (count["encoder"], count["predictor"]) == pytest.approx(RELEASED[name], abs=0.006)
        assert (settings.train.batch, settings.recipe.masks.mode) == (2048, "paper")
        ema = settings.ema
        assert (ema.start, ema.final, settings.optim.lr) == (0.996, 1.0, 1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_smoke_leaves_what_the_argument_says(name):
    if name in RELEASED:
        train = config(name, "smoke,batch=16,seed=3")["train"]
        assert (train["batch"], train["seed"], train["steps"]) == (16, 3, 3)
    else:
        values = config(name, "smoke,epochs=2,seed=3")
        train = values["train"]
        assert (train["epochs"], train["steps"], train["seed"]) == (2.0, None, 3)
        assert resolve(values, 80).train.steps == 20


def test_momentum_stretches_with_the_schedules():
    values = config("scenes", "smoke")
    values["train"]["steps"], values["optim"]["schedule_scale"] = 100, 1.25
    momentum = resolve(values).recipe.momentum
    assert float(momentum(100)) == pytest.approx(0.99 + 0.01 * 100 / 125)


def test_smoke_of_perplexity_leaves_what_the_argument_says():
    told = {"policies": "sinks", "cache_sizes": "32+64", "sinks": "1+3", "tokens": "150"}
    values = perplexity.get_config(",".join(["smoke", *(f"{k}={v}" for k, v in told.items())]))
    assert (values.policies, values.cache_sizes) == (("sinks",), (32, 64))
    assert (values.sinks, values.tokens, values.chunk) == ((1, 3), 150, 32)
    assert perplexity.get_config("smoke").cache_sizes == (16,)


# The smoke of every released recipe has the same sizes: one of them stands for all.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "mnist", "scenes", "in1k_vith14"])
def test_smoke_trains_three_steps(name, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])
    values = config(name, "smoke")
    assert jepa_pretrain.run(Run(values, tmp_path)) == 0
    for file in ("config.json", "metrics.jsonl", "curves.png", "result.json", "checkpoints/3"):
        assert (tmp_path / file).exists(), file
