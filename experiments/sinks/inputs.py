"""What the jobs of sinks/ share: opening a model and a text."""

import sinks
from common.config import ConfigError
from sinks import text
from sinks.loading import DTYPES, Model
from sinks.text import Document


def open_model(name: str, dtype: str = "float32") -> Model:
    """`sinks.load`, whose errors are the user's settings."""
    try:
        return sinks.load(name, dtype=dtype)
    except (ValueError, OSError) as error:
        setting = "model" if dtype in DTYPES else "dtype"
        raise ConfigError(f"config.{setting}: {error}") from error


def read_documents(where: str) -> list[Document]:
    """The texts that config.text names. Read them before the model is loaded, which takes longer to fail."""
    try:
        return text.documents(where)
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.text: {error}") from error
