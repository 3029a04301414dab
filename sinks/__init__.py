"""StreamingLLM (Xiao et al., ICLR 2024) as a jitted key-value cache.

    import sinks
    from sinks import stream
    config, params, tokenizer = sinks.load("smollm2-135m")

`cache.py` -> `attention.py` -> `stream.py` are the paper in its order; `models/` has the families, `loading.py` fills them.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sinks.loading import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str):
    """All is imported when it is first needed: `python -m sinks.chat` passes here before it can handle Ctrl-C."""
    if not name.startswith("_"):
        loading = importlib.import_module("sinks.loading")  # and with it most of the package
        if name in __all__ and hasattr(loading, name):
            return getattr(loading, name)
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
