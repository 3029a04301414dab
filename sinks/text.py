"""Long texts to stream: what is always there, a file, or a folder of books; and their tokens.

Legend: N tokens.
"""

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sinks.progress import track
from sinks.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """One text, such as a book."""

    name: str
    text: str


def documents(where: str) -> list[Document]:
    """The texts at `where`, by name.

    Args:
      where: "embedded" for the beginning of War and Peace, which comes with this package; "python-topics" for the manual
        that comes with Python (half a million characters); a text file; or a folder, for all its .txt files (.TXT too).

    Raises:
      ValueError: nothing there, an empty text, or a file that is not UTF-8.
    """
    if where == "embedded":
        book = importlib.resources.files("sinks") / "data" / "war_and_peace.txt"
        return [Document("war_and_peace", book.read_text(encoding="utf-8"))]
    if where == "python-topics":
        from pydoc_data.topics import topics

        return [Document(where, "\n\n".join(topics[name] for name in sorted(topics)))]
    path = Path(where).expanduser()
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt")
    if not files:
        what = "a folder without .txt files" if path.is_dir() else "no file and no folder"
        raise ValueError(f"text {where!r}: {what}. 'embedded' is a text that is always there")
    return [Document(file.stem, _read(file)) for file in files]


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is no UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def tokens(
    tokenizer: Tokenizer, texts: Sequence[Document], *, bos: bool = True
) -> list[np.ndarray]:
    """The token ids of each document, int32 [N], with the tokenizer's first token in front where it has one and `bos`."""
    start = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    whole = track(texts, "tokenizing" if len(texts) > 1 else "")
    return [np.asarray([*start, *tokenizer.encode(document.text)], np.int32) for document in whole]
