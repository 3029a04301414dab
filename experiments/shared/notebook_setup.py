"""What the first cell of every notebook does: installs what this machine's chips need, and looks whether jax uses them.

In Colab it installs them; elsewhere it says how. Only the standard library is needed to import it.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# In the environment of a machine with TPU chips: of Colab (older runtimes), of a TPU VM, of Kaggle.
TPU_VARIABLES = ("COLAB_TPU_ADDR", "TPU_ACCELERATOR_TYPE", "TPU_NAME", "TPU_WORKER_ID")
# PCI ids of Google's TPU chips, v2 to v7.
TPU_CHIPS = {"0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
CUDA13_DRIVER, CUDA13_COMPUTE = (
    580,
    7.5,
)  # what CUDA 13 needs at least; older GPUs and drivers take CUDA 12
# What a kernel may hold from before an installation. Compiled code cannot be loaded twice.
LOADED = ("jax", "jaxlib", "numpy", "ml_dtypes", "flax", "optax", "scipy")

Installed = Callable[[str], str | None]


def prepare(project: Path) -> None:
    """Installs or names what is missing, and warns where jax does not use the machine's chips.

    Raises:
      SystemExit: the kernel has to be started again, or something has to be installed by hand; the message says what.
    """
    extra = extra_of(os.environ, _pci_devices(), _nvidia_smi(), _version)
    missing = unmet(requirements(project), "", _version)
    chips = unmet(requirements(project), extra, _version) if extra else []
    if missing or (chips and in_colab()):
        target = f"{project}[{extra}]" if extra else str(project)
        if not in_colab():
            raise SystemExit(
                f"Missing here: {', '.join(missing)}. Run  %pip install -e '{project}[notebooks]'  and restart the kernel."
            )
        print(f"installing {target}: some minutes ...", flush=True)
        done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", target], check=False)
        if done.returncode:
            raise SystemExit(f"pip could not install {target}; what it said is above.")
        importlib.invalidate_caches()
    if old := stale(sys.modules, _version):
        raise SystemExit(
            f"Restart the session now (Runtime > Restart session), then run this cell again: {', '.join(old)} "
            "changed under the running kernel."
        )
    import jax

    if warning := fell_back(extra, jax.default_backend(), os.environ.get("JAX_PLATFORMS", "")):
        print(warning)
    print(f"jax {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}")


def extra_of(
    env: Mapping[str, str], pci: set[str], nvidia_smi: str, version: Installed = lambda name: None
) -> str:
    """The extra of pyproject.toml for this machine's chips: "tpu", "cuda" (CUDA 13), "cuda12", or "" for a CPU.

    Args:
      pci: device ids of Google's chips.
      nvidia_smi: what `nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader` prints; "" without it.
      version: an installed package's version. A plugin that is there is brought up to date, not doubled.
    """
    if pci & TPU_CHIPS or any(env.get(name) for name in TPU_VARIABLES):
        return "tpu"
    if not nvidia_smi.strip():
        return ""
    if version("jax-cuda12-plugin") and not version("jax-cuda13-plugin"):
        return "cuda12"
    driver, _, compute = nvidia_smi.splitlines()[0].partition(",")
    new = int(driver.partition(".")[0]) >= CUDA13_DRIVER and float(compute) >= CUDA13_COMPUTE
    return "cuda" if new else "cuda12"


def requirements(project: Path) -> Callable[[str], list[str]]:
    """A function from an extra ("" for none) to its requirements in pyproject.toml."""
    table = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    return lambda extra: table["optional-dependencies"][extra] if extra else table["dependencies"]


def unmet(wanted: Callable[[str], list[str]], extra: str, version: Installed) -> list[str]:
    """The requirements of an extra, and of its requirements in turn, that no installed version meets."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return list(wanted(extra))

    def check(text: str, of_extra: str = "") -> Iterator[str]:
        need = Requirement(text)
        if need.marker and not need.marker.evaluate({"extra": of_extra}):
            return
        has = version(need.name)
        if has is None or not need.specifier.contains(has, prereleases=True):
            yield f"{need.name}{need.specifier}" + (f" (here {has})" if has else "")
            return
        for inner in need.extras:
            for line in importlib.metadata.requires(need.name) or ():
                if f'extra == "{inner}"' in line.replace("'", '"'):
                    yield from check(line, inner)

    return [problem for text in wanted(extra) for problem in check(text)]


def stale(modules: Mapping[str, Any], version: Installed) -> list[str]:
    """The libraries of which this kernel holds another version than is installed."""
    held = {
        n: str(modules[n].__version__) for n in LOADED if hasattr(modules.get(n), "__version__")
    }
    return [
        f"{n} {old} -> {new}" for n, old in held.items() if (new := version(n)) not in (None, old)
    ]


def fell_back(extra: str, backend: str, asked: str) -> str:
    """A warning where the machine has chips that jax does not use, unless JAX_PLATFORMS asked for that; else ""."""
    if not extra or backend != "cpu" or "cpu" in asked.split(","):
        return ""
    chip = "TPU" if extra == "tpu" else "GPU"
    return (
        f"WARNING: this machine has a {chip}, but jax runs on the CPU. Its plugin is missing or of another version: "
        f"install the extra `{extra}` (pip install '.[{extra}]') and restart the kernel."
    )


def in_colab() -> bool:
    return "google.colab" in sys.modules or bool(os.environ.get("COLAB_RELEASE_TAG"))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pci_devices() -> set[str]:
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    google = [path for path in vendors if path.read_text().strip() == "0x1ae0"]
    return {path.with_name("device").read_text().strip() for path in google}


def _nvidia_smi() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
