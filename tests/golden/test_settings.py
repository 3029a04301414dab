"""What every config resolves to, for each of its arguments, is what tests/golden/settings.json says.

After a change that is meant: `python -m tests.golden.test_settings` writes the file again; read its diff.
"""

import importlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from common.config import build
from experiments.jepa.settings import resolve
from experiments.metaopt import grid_job, table1
from experiments.shared.run import hash_of
from experiments.sinks import attention_map, perplexity, pretrain, speed, tasks
from jepa.recipe import AddMasks

GOLDEN = Path(__file__).with_name("settings.json")
RELEASED = ("in1k_vith14", "in1k_vith16_448", "in22k_vith14", "in22k_vitg16")
OURS = ("cifar10", "mnist", "scenes")
CONFIGS = {  # the arguments of each config, one at a time and the pairs that say something else together
    **{f"jepa.{n}": ("smoke", "epochs=2", "seed=3", "smoke,epochs=2") for n in OURS},
    **{f"jepa.{n}": ("smoke", "seed=3", "batch=256", "smoke,batch=16") for n in RELEASED},
    "sinks.attention_map": ("smoke", "model=x", "text=y"),
    "sinks.perplexity": (
        "smoke",
        "model=x",
        "text=y",
        "tokens=500",
        "policies=dense+recompute+evict_for_space",
        "cache_sizes=512+2048",
        "sinks=0+4",
        "smoke,tokens=150,cache_sizes=32+64",
    ),
    "sinks.pretrain": ("smoke",),
    "sinks.qa_stream": ("smoke", "model=x"),
    "sinks.speed": ("smoke", "model=x"),
    "sinks.streameval": ("smoke", "model=x", "keys=lines"),
    "metaopt.charrnn": ("smoke", "epochs=2", "seeds=2"),
    "metaopt.cifar10_resnet20": ("smoke", "small", "epochs=2", "seeds=2", "small,smoke,epochs=3"),
    "metaopt.gpt": ("smoke", "epochs=2", "seeds=2"),
    "metaopt.mnist_table1": ("smoke", "seeds=2"),
    "metaopt.mnist_towers": ("smoke", "epochs=2", "seeds=2", "smoke,epochs=3,seeds=2"),
    "metaopt.robustness": (
        "smoke",
        "task=cifar10",
        "task=charrnn",
        "task=gpt",
        "task=cifar10,full",
        "task=gpt,smoke",
        "epochs=2",
        "seeds=2",
    ),
}


def resolved(job: str, values: dict[str, Any]) -> dict[str, Any]:
    """The objects that a job works with."""
    if job == "jepa_pretrain":
        s = resolve(values)
        stream = repr(s.augmentation), repr(AddMasks(s.recipe.masks, s.train.seed))
        return {f.name: getattr(s, f.name) for f in fields(s)} | {
            "model": s.recipe.model, "crop": s.evaluation_crop, "probing": s.probe.spec(s.train.seed),
            "saved with the stream of data": stream,
        }  # fmt: skip
    if job.startswith("metaopt"):
        s = build(grid_job.Settings if job == "metaopt_grid" else table1.Settings, values)
        return {f.name: getattr(s, f.name) for f in fields(s)}
    if job == "sinks_pretrain":
        s = build(pretrain.Settings, values)
        models = {name: s.recipe(name).model for name in s.variants}
        return {"settings": s, "models": models, "streams": s.evaluate.specs()}
    if job == "sinks_perplexity":
        s = build(perplexity.Settings, values)
        return {"settings": s, "sweep": dict(s.sweep(10))}
    if job == "sinks_speed":
        s = build(speed.Settings, values)
        return {"settings": s, "specs": [s.spec(p, n) for p in s.policies for n in s.cache_sizes]}
    if job == "sinks_attention_map":
        s = build(attention_map.Settings, values)
        return {"settings": s, "spec": s.spec}
    cls = {"sinks_streameval": tasks.StreamEvalSettings, "sinks_qa_stream": tasks.QASettings}[job]
    s = build(cls, values)
    return {"settings": s, "runs": s.runs()}


def plain(value: Any) -> Any:
    """JSON of what is set. Left out: functions, and what is 0, False, empty or None, which is off or not set.

    Of a job's class that extends a library's, the library's fields.
    """
    if is_dataclass(value) and not isinstance(value, type):
        lineage = [c for c in type(value).__mro__ if is_dataclass(c)]
        cls = next((c for c in lineage if not c.__module__.startswith("experiments")), lineage[0])
        value = {f.name: getattr(value, f.name) for f in fields(cls)}
    if isinstance(value, dict):
        return {k: p for k, v in value.items() if (p := plain(v)) and k != "job"}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value if not callable(v)]
    return None if callable(value) else value


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name.strip("."): value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}.{key}").items()}


def settings_of(config: str, arg: str) -> dict[str, Any]:
    paper, name = config.split(".")
    module = importlib.import_module(f"experiments.{paper}.configs.{name}")
    values = module.get_config(arg).to_dict()
    return {"hash of its rows": hash_of(values)} | flat(plain(resolved(values["job"], values)))


def described(config: str) -> dict[str, dict[str, str]]:
    """By argument: all settings without one, and what each changes, as JSON (null: no longer set)."""
    full = settings_of(config, "")
    found = {config: full}
    for arg in CONFIGS[config]:
        now = settings_of(config, arg)
        changed = {k: now.get(k) for k in {**full, **now} if full.get(k) != now.get(k)}
        found[f"{config}:{arg}"] = changed
    return {k: {name: json.dumps(v) for name, v in found[k].items()} for k in found}


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_resolve_to_what_they_did(config):
    golden = json.loads(GOLDEN.read_text())
    assert described(config) == {k: v for k, v in golden.items() if k.partition(":")[0] == config}


def test_every_config_is_in_the_golden_file():
    found = {
        f"{path.parts[-3]}.{path.stem}"
        for path in Path("experiments").glob("*/configs/*.py")
        if "def get_config" in path.read_text()
    }
    assert found == set(CONFIGS)


if __name__ == "__main__":
    everything = {k: v for config in CONFIGS for k, v in described(config).items()}
    GOLDEN.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
