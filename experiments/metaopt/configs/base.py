"""What the metaopt configs share: the four tasks."""

from types import SimpleNamespace

from ml_collections import ConfigDict

from common.config import ConfigError
from experiments.metaopt.grid_job import Settings
from experiments.shared.settings import to_config

DECADES = tuple(10.0**k for k in range(-8, 3))  # 1e-8 to 1e2, figure 4
BOOK = "war_and_peace.txt"  # the whole book, in the folder where the run is started

# What is trained, and its batch. See TaskSettings in experiments/metaopt/grid_job.py.
TASKS = {
    "mnist": ({"kind": "mlp", "data": "mnist", "hidden": 128}, 256),
    "cifar10": ({"kind": "resnet", "data": "cifar10", "hidden": 16, "depth": 20}, 128),
    "charrnn": ({"kind": "charrnn", "data": BOOK, "hidden": 128, "depth": 2, "length": 50}, 50),
    "gpt": ({"kind": "gpt", "data": BOOK, "hidden": 128, "depth": 4, "length": 64}, 32),
}
SMOKE = {
    "mlp": {"data": "digits", "hidden": 8},
    "resnet": {"data": "digits", "hidden": 4, "depth": 8},
    "charrnn": {"data": "embedded", "hidden": 8, "length": 16},
    "gpt": {"data": "embedded", "hidden": 32, "depth": 1, "length": 16},
}


def base(task: str = "mnist", settings: type = Settings) -> ConfigDict:
    """Every setting of a job with such a task; configs change what differs."""
    if task not in TASKS:
        raise ConfigError(f"task={task!r} is unknown; known: {', '.join(TASKS)}")
    config, (own, batch) = to_config(settings), TASKS[task]
    config.task.update(own)
    config.grid.update(epochs=30, batch=batch, rates=DECADES)
    return config


def seeds(args: SimpleNamespace) -> tuple[int, ...]:
    """The seeds that the argument seeds=N stands for."""
    if args.seeds < 1:
        raise ConfigError(f"config argument 'seeds={args.seeds}': at least 1")
    return tuple(range(args.seeds))


def smoke(config: ConfigDict, args: SimpleNamespace) -> ConfigDict:
    """Shrinks a config to seconds on the embedded digits or text, with the same code paths.

    What the argument itself says of epochs and seeds stays.
    """
    config.task.update(SMOKE[config.task.kind], examples=128)
    config.grid.update(batch=32, rates=(1e-3, 1.0), save_every=1)
    small = {"epochs": 2, "seeds": (0,)}
    config.grid.update({name: n for name, n in small.items() if name not in args.given})
    if "methods" in config:
        config.methods = config.methods[:2]
    return config
