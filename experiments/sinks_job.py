"""What the jobs of sinks/ share: opening a model and a text, and ending in a row."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import sinks
from common.config import ConfigError
from common.results import append_row, make_row
from sinks import text
from sinks.loading import DTYPES, Model


def open_model(name: str, dtype: str = "float32") -> Model:
    """`sinks.load`, whose errors are the user's settings."""
    try:
        return sinks.load(name, dtype=dtype)
    except (ValueError, OSError) as error:
        setting = "model" if dtype in DTYPES else "dtype"
        raise ConfigError(f"config.{setting}: {error}") from error


def open_tokens(
    where: str, model: Model, *, bos: bool = True
) -> tuple[list[str], list[np.ndarray]]:
    """Names and token ids of the documents that config.text names."""
    try:
        documents = text.documents(where)
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.text: {error}") from error
    return [d.name for d in documents], text.tokens(model.tokenizer, documents, bos=bos)


def begin(workdir: Path, values: Mapping[str, Any]) -> float:
    """Makes the workdir with its config.json; returns the time, for `finish`."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(dict(values), indent=2) + "\n")
    return time.perf_counter()


def finish(
    workdir: Path,
    values: Mapping[str, Any],
    metrics: Mapping[str, float],
    *,
    steps: int,
    began: float,
    seed: int = 0,
) -> None:
    """Writes result.json and appends it to results.jsonl."""
    row = make_row(
        job=values["job"],
        config=values["name"],
        metrics=metrics,
        seeds=[seed],
        steps=steps,
        wall_seconds=time.perf_counter() - began,
        resolved=values,
    )
    (workdir / "result.json").write_text(json.dumps(dataclasses.asdict(row), indent=2) + "\n")
    append_row(workdir / "results.jsonl", row)
