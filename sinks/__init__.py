"""StreamingLLM (Xiao et al., ICLR 2024) as a jitted key-value cache.

    import sinks
    from sinks import stream
    config, params, tokenizer = sinks.load("smollm2-135m")

`cache.py` -> `attention.py` -> `stream.py` are the paper in its order; `models/` has the families, `loading.py` fills them.
"""

from sinks.loading import Model, load

__all__ = ["Model", "load"]
