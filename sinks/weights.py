"""Safetensors checkpoints: a folder as transformers saves it, or the name of one on the Hugging Face hub."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from sinks.fields import shown

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
    """A tensor in a file: what is known of it at once, and its values.

    Attributes:
      read: brings the values.
      dtype: as safetensors calls it: "F32", "BF16", "I64".
      name, file: what the file calls it, and the file, for messages.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: str = "F32"
    name: str = ""
    file: str | Path = ""


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder's config.json, and its tensors by name; values are read when they are asked for.

    One model.safetensors, or several with their index. Raises ValueError where something is absent, cut off or not
    safetensors, and where the index names a file that is not in the folder.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: it is no checkpoint folder of transformers")
    config = read_json(path)
    tensors: dict[str, Tensor] = {}
    for file in _files(folder):
        found = _open(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(
                f"{file} holds {shown(twice[0])}, and so does {tensors[twice[0]].file}: one of the two is left over from "
                "another checkpoint"
            )
        tensors |= found
    return config, tensors


def _files(folder: Path) -> list[Path]:
    if (index := folder / INDEX).is_file():
        names = _indexed(index)
        files = [folder / name for name in names]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which its {INDEX} names")
    elif (file := folder / "model.safetensors").is_file():
        files = [file]  # others next to it are adapters, or the same weights under other names
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


def _indexed(index: Path) -> list[str]:
    """The files that an index names. A name leads nowhere else: it is a file next to the index, as transformers saves it.

    (The file itself may be a link, as in huggingface_hub's cache: that is the folder's owner's doing, not the index's.)
    """
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} has no weight_map, an object of tensors and their files")
    for tensor, name in where.items():
        if not (isinstance(name, str) and re.fullmatch(r"[^/\\:\0]+\.safetensors", name)):
            raise ValueError(
                f"{index} says that {shown(tensor)} is in {str(name)[:80]!r}: that is no .safetensors file "
                "next to it"
            )
    return sorted(set(where.values()))


def _open(file: Path) -> dict[str, Tensor]:
    try:
        handle = safetensors.safe_open(file, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is no whole safetensors file ({error}): it is cut off or something else, fetch it again"
        ) from error
    tensors = {}
    for name in handle.keys():  # noqa: SIM118 (it is no dict)
        header = handle.get_slice(name)
        shape, dtype = tuple(header.get_shape()), str(header.get_dtype())
        tensors[name] = Tensor(shape, lambda name=name: handle.get_tensor(name), dtype, name, file)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises ValueError, naming it, where it holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__} instead of an object")
    return value


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
