"""What the jobs of sinks/ share: opening a model and a text."""

import numpy as np

import sinks
from common.config import ConfigError
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
