"""Safetensors checkpoints: a folder as transformers saves it, or the name of one on the Hugging Face hub."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_HUB_FILES = [
    "*.safetensors",
    INDEX,
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.jinja",
]


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its shape is known at once, `read()` brings its values."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder's config.json, and its tensors by name; values are read when they are asked for.

    One model.safetensors, or several with their index. Raises ValueError where something is absent, cut off or not
    safetensors.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: it is no checkpoint folder of transformers")
    config = _json(path)
    tensors = {}
    for file in _files(folder):
        tensors |= _open(file)
    return config, tensors


def _files(folder: Path) -> list[Path]:
    if (index := folder / INDEX).is_file():
        files = [folder / name for name in sorted(set(_json(index).get("weight_map", {}).values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which its {INDEX} names")
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        hint = ""
        if list(folder.glob("*.bin")):
            hint = (
                ", only pickled weights, which are never loaded: save them with transformers' "
                "model.save_pretrained(folder)"
            )
        raise ValueError(f"{folder} has no .safetensors file{hint}")
    return files


def _open(file: Path) -> dict[str, Tensor]:
    try:
        handle = safetensors.safe_open(file, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is no whole safetensors file ({error}): it is cut off or something else, fetch it again"
        ) from error
    return {
        name: Tensor(
            tuple(handle.get_slice(name).get_shape()), lambda name=name: handle.get_tensor(name)
        )
        for name in handle.keys()  # noqa: SIM118 (it is no dict)
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): fetch it again") from error


def is_hub_id(name: str) -> bool:
    """Whether `name` reads like "owner/model" or "owner/model@revision"."""
    return _HUB_ID.fullmatch(name) is not None


def fetch_from_hub(name: str) -> Path:
    """The folder of "owner/model" or "owner/model@revision" in huggingface_hub's cache, downloaded on first use.

    Raises OSError where the hub cannot be reached or does not give the model.
    """
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=_HUB_FILES
        )
    except Exception as error:  # httpx's, the hub's own, ValueError
        raise OSError(
            f"could not get {name} from the Hugging Face hub ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Check the name and the network, run `hf auth login` for gated models, or give a local folder"
        ) from error
    return Path(folder)
