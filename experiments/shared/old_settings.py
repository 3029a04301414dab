"""Configs of version 0.1: "not set" was 0 or "", now None, and some settings were not there, or still were."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

# What said "not set", by the setting's name.
NOT_SET: dict[str, Any] = {
    **dict.fromkeys(("data.probe_split", "data.data_dir", "writers.wandb_project"), ""),
    **dict.fromkeys(("data.examples", "data.eval_resize", "masks.context_tokens", "policy.unroll"), 0),
    **{f"model.{n}": 0 for n in ("width", "depth", "heads", "hidden")},
    **{f"model.predictor_{n}": 0 for n in ("width", "depth", "heads")},
    **{f"probe.{n}": 0 for n in ("knn_train", "knn_test", "train_examples", "test_examples")},
    **{"optim.clip": 0.0, "train.epochs": 0.0, "train.steps": 0},
    **dict.fromkeys(("tokens", "sample", "recent", "task.depth", "task.length", "task.examples"), 0),
    **{"task.data_dir": "", "rows": ()},
}  # fmt: skip
# By job: settings of today at the values that 0.1 had without them, and settings that only 0.1 had.
_JEPA = {"optim.warmup": 0, "data.on_device": False, "policy.form": None}
ADDED: dict[str, dict[str, Any]] = {
    "jepa_pretrain": _JEPA,
    "jepa_baselines": _JEPA,
    "sinks_pretrain": {"optim.b1": 0.9, "optim.eps": 1e-8, "optim.schedule_scale": 1.0},
}
GONE: dict[str, dict[str, Any]] = {"metaopt_table1": {"methods": ()}}


def renewed(values: Mapping[str, Any], tell: bool = False) -> dict[str, Any]:
    """A config of 0.1 in today's form, with a line on stderr for each change if asked to `tell`; one of today as it is."""

    def change(name: str, value: Any) -> Any:
        if name not in NOT_SET or value is None or value:
            return value
        if tell:
            print(
                f"warning: --config.{name}={value!r} is taken as None, which says \"not set\" since version 0.2; "
                "it works until 0.3", file=sys.stderr,
            )  # fmt: skip
        return None

    gone = GONE.get(values.get("job", ""), {})
    return _each(values, change, lambda name, v: name in gone)


def as_before(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config in the form of 0.1, of which rows and the parts of sweeps have the hash."""
    job = values.get("job", "")
    added = ADDED.get(job, {})
    return GONE.get(job, {}) | _each(
        values,
        lambda name, v: NOT_SET.get(name) if v is None else v,
        lambda name, v: name in added and v == added[name],
    )


def _each(
    values: Mapping[str, Any],
    change: Callable[[str, Any], Any],
    drop: Callable[[str, Any], bool] = lambda name, v: False,
    above: str = "",
) -> dict[str, Any]:
    return {
        k: _each(v, change, drop, f"{above}{k}.")
        if isinstance(v, Mapping)
        else change(above + k, v)
        for k, v in values.items()
        if not drop(above + k, v)
    }
