"""Files cite documents that are in the repository, by sections that these have."""

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NUMBER = r"\d+(?:\.\d+)*(?![\w%])"
GAP = r"[\s#]+"  # a citation may go on in the next line of a comment
CITATION = re.compile(
    rf"\b(docs/[\w./-]*\w\.md)((?:{GAP}{NUMBER}(?:(?:,|{GAP}(?:to|and)){GAP}{NUMBER})*)?)"
)
HEADING = re.compile(rf"^#+ ({NUMBER})", re.MULTILINE)
OF_NO_DOCUMENT = re.compile(rf"\bspecs?{GAP}\d|\bspecs[/]")  # notes that only their author has


def tracked() -> dict[str, str]:
    """Path -> text of every file that git knows and that is text."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    texts = {}
    for path in listed.stdout.decode().strip("\0").split("\0"):
        try:
            texts[path] = (ROOT / path).read_text("utf-8")
        except (
            UnicodeDecodeError,
            FileNotFoundError,
        ):  # not text, or deleted and not yet committed
            continue
    return texts


def wrong_citations(texts: Mapping[str, str]) -> Iterator[str]:
    """What is cited in .py, .md and .ipynb files and is not there, one line each."""
    for path, text in texts.items():
        if not path.endswith((".py", ".md", ".ipynb")):
            continue
        for citation in CITATION.finditer(text):
            document, numbers = citation.groups()
            where = f"{path}:{text.count(chr(10), 0, citation.start()) + 1}"
            if document not in texts:
                yield f"{where}: {document} is not there"
                continue
            sections = HEADING.findall(texts[document])
            for number in re.findall(NUMBER, numbers):
                if number not in sections:
                    yield f"{where}: {document} has no section {number}"


def test_cited_documents_and_their_sections_exist():
    texts = tracked()
    assert any(CITATION.search(text) for path, text in texts.items() if path.startswith("jepa/"))
    assert not list(wrong_citations(texts))


def test_nothing_is_cited_that_no_reader_has():
    wrong = []
    for path, text in tracked().items():
        if not path.startswith("docs/"):
            wrong += [f"{path}: {found.group()}" for found in OF_NO_DOCUMENT.finditer(text)]
    assert not wrong


DOCUMENT = "docs/" + "a/N.md"


@pytest.mark.parametrize(
    ("numbers", "wrong"),
    [
        ("", []),
        (" 1.3", []),
        (" 2. Then 7 more", []),
        (' 2, "9% of labels")', []),
        (" 1.0 to 1.4, in millions", ["1.4"]),
        (" 1.3, 5 and 6)", ["5", "6"]),
        ("\n    # 3)", ["3"]),
        (" 1.3.1", ["1.3.1"]),
        (" 1.30", ["1.30"]),
    ],
)
def test_a_wrong_number_is_found(numbers, wrong):
    texts = {DOCUMENT: "# N\n## 1 One\n### 1.0 A\n### 1.3 B\n## 2 Two", "x.py": DOCUMENT + numbers}
    assert [line.rsplit(" ", 1)[1] for line in wrong_citations(texts)] == wrong


def test_a_missing_document_is_found():
    texts = {"x.py": f"\n({DOCUMENT} 1)"}
    assert list(wrong_citations(texts)) == [f"x.py:2: {DOCUMENT} is not there"]
