"""StreamingLLM (Xiao et al., ICLR 2024) as a jitted key-value cache.

    import sinks
    from sinks import stream
    config, params, tokenizer = sinks.load("smollm2-135m")

`cache.py` -> `attention.py` -> `stream.py` are the paper in its order; `models/` has the families, `loading.py` fills them.
"""

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sinks.loading import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str):
    """All is imported when it is first needed: `python -m sinks.chat` passes here before it can handle Ctrl-C."""
    if name in __all__:
        return getattr(importlib.import_module("sinks.loading"), name)
    if not name.startswith("_") and importlib.util.find_spec(f"sinks.{name}"):
        return importlib.import_module(f"sinks.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
