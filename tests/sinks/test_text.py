"""Texts are found whole, and what is not text is named."""

import numpy as np
import pytest

from sinks import text, tokenizer_files
from tests.sinks.checkpoints import byte_level_metadata

TOKENIZER = tokenizer_files.from_gguf(byte_level_metadata())


@pytest.mark.parametrize("name, size", [("embedded", 90_000), ("python-topics", 300_000)])
def test_a_text_is_always_there(name, size):
    (document,) = text.documents(name)
    assert len(document.text) > size


def test_a_folder_gives_its_books_by_name(tmp_path):
    for name, content in (("b.txt", "the é"), ("a.TXT", "he\r\n")):
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "c.bin").write_bytes(b"\xff")
    books = text.documents(str(tmp_path))
    assert [(b.name, b.text) for b in books] == [("a", "he\n"), ("b", "the é")]
    assert text.documents(str(tmp_path / "b.txt")) == books[1:]
    ids = text.tokens(TOKENIZER, books)
    assert [TOKENIZER.decode(row) for row in ids] == ["<|im_start|>he\n", "<|im_start|>the é"]
    assert all(row.dtype == np.int32 for row in ids)
    assert TOKENIZER.decode(text.tokens(TOKENIZER, books, bos=False)[1]) == "the é"


def test_what_is_no_text_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file and no folder\. 'embedded' is a text"):
        text.documents(str(tmp_path / "x"))
    with pytest.raises(ValueError, match=r"a folder without \.txt files"):
        text.documents(str(tmp_path))
    (tmp_path / "x.txt").write_bytes(b"ab\xff")
    with pytest.raises(
        ValueError, match=r"x\.txt is no UTF-8 text \(invalid start byte at byte 2\)"
    ):
        text.documents(str(tmp_path))
    (tmp_path / "x.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"x\.txt is empty"):
        text.documents(str(tmp_path))
