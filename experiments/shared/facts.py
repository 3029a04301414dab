"""What has to be equal on every process of a run: settings, code and the libraries that decide the programs."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from common.commit import packages
from common.results import PACKAGES

ROOT = Path(__file__).parents[2]
# Those of jax's own settings that change numbers.
JAX_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)


def run_facts(config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> value as text, for `common.distributed.require_same`; about 10 kB."""
    facts = {name: repr(value) for name, value in _leaves(config, "config")}
    facts |= {"python": platform.python_version()}
    facts |= {f"{name}'s version": _version(name) for name in PACKAGES}
    facts |= {name: repr(getattr(jax.config, name, None)) for name in JAX_SETTINGS}
    return facts | source_digests(ROOT)


def data_facts(**fingerprints: Mapping[str, Any]) -> dict[str, str]:
    """The entries of data fingerprints by the set's name: every process must see the same records."""
    return {
        f"{name} data's {key}": json.dumps(value)
        for name, known in fingerprints.items()
        for key, value in known.items()
    }


def source_digests(root: Path) -> dict[str, str]:
    """A short digest of every source file of our packages under `root`, but for configs, whose values are compared."""
    digests = {}
    for path in sorted(
        path for package in packages(root) for path in (root / package).rglob("*.py")
    ):
        if path.parent.name != "configs":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            digests[f"the code {path.relative_to(root).as_posix()}"] = digest[:12]
    return digests


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}")
    else:
        yield name, value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
