"""What documents name exists: files, sections, rows and commands. Their sentences are short."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from absl.testing import flagsaver

from experiments import launch
from experiments.shared.run import settings_of

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "jepa", "sinks", "metaopt", "experiments")
ON_TOP = [ROOT / name for name in ("README.md", "WORKSPACE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS = [*ON_TOP, *sorted((ROOT / "docs").rglob("*.md"))]
JOURNAL = ROOT / "docs" / "journal.md"  # tells of files and commands of its day
LONGEST = 30  # words of a sentence


def each(documents):
    return pytest.mark.parametrize(
        "document", documents, ids=lambda path: str(path.relative_to(ROOT))
    )


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The names by which links reach a document's headings."""
    heads = re.findall(r"^#+ (.*)$", without_code(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each(DOCUMENTS)
def test_links_lead_somewhere(document):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text())):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


@each([path for path in DOCUMENTS if path != JOURNAL])
def test_named_files_exist(document):
    text = document.read_text()
    places = (ROOT, document.parent, ROOT / "experiments" / "results")
    lost = []
    for name in re.findall(r"(?<![\w/.])((?:[\w.-]+/)+[\w.-]*)", text):
        name = name.rstrip(".")
        if name.split("/")[0] not in (*PACKAGES, "tests", "docs", "examples"):
            continue
        if not any((place / name).exists() for place in places):
            lost.append(name)
    assert not lost


def test_named_rows_are_committed():
    rows = "".join(p.read_text() for p in (ROOT / "experiments" / "results").rglob("*.jsonl"))
    known = set(re.findall(r'"id": "([^"]+)"', rows))
    for name in ("README.md", "docs/results/report.md", "docs/status.md", "docs/results/tables.md"):
        cited = set(re.findall(r"\b\w+-[0-9a-f]{8}\b", (ROOT / name).read_text()))
        assert cited <= known, f"{name}: {sorted(cited - known)}"


def sentences(text: str):
    """Sentences of prose, list items and cells of tables; a piece of code or a link counts as one word."""
    text = re.sub(r"`[^`]*`", "code", without_code(text))
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\b(et al|e\.g|i\.e|vs)\.", r"\1", text)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|\n(?=#)|\|", text):
        yield from re.split(r"(?<=[.!?])[\"')*]*\s+", " ".join(block.split()))


def too_long(sentence: str) -> bool:
    return len(re.findall(r"\w\S*", sentence)) > LONGEST


@each([path for path in DOCUMENTS if path != JOURNAL])
def test_sentences_are_short(document):
    assert [s for s in sentences(document.read_text()) if too_long(s)] == []


def test_a_long_sentence_is_found():
    words = ["word"] * LONGEST
    text = f"## Title\n\n{' '.join(words)}. It is `a b c` short.\n- {' '.join(words)} more\n| a | b |\n"
    assert [s for s in sentences(text) if too_long(s)] == [" ".join(["-", *words, "more"])]


@each([path for path in DOCUMENTS if path != JOURNAL])
def test_words_are_plain(document):
    text = without_code(document.read_text())
    quaint = r"\b(?:anew|beside|forever|(?:was|is|be|are|were) had|whence|thereof|lest)\b"
    openings = r"(?:(?<=[.!?] )|(?<=\n\n))Of [a-z]\w+"
    assert re.findall(f"{quaint}|{openings}", re.sub(r"`[^`]*`", "code", text)) == []


def commands(text: str):
    """Every command that a document prints, in blocks of code or in a line."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for line in "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", without_code(text))]).splitlines():
        words = (
            shlex.split(line, comments=True) if re.match(r"(\w+=\S+ )*(make|python) ", line) else []
        )
        while words and "=" in words[0]:
            words.pop(0)
        if words and words != ["python", "-m", "..."]:
            yield words


PRINTED = [
    pytest.param(words, id=f"{path.name}: {' '.join(words)}")
    for path in DOCUMENTS
    if path != JOURNAL
    for words in commands(path.read_text())
]


class Accepted(Exception):
    """A parser took its arguments."""


def accept(words: list[str], monkeypatch) -> None:
    """Hands a command to its own program, up to where it would run."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[1] != "-m":
        assert (ROOT / words[1]).is_file() and len(words) == 2
    elif words[2] == "experiments.launch":
        argv = ["launch", *words[3:], "--help"]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
        with flagsaver.flagsaver():
            assert launch.main(argv) == 0
    else:
        name = words[2] if words[2] != "common.data" else "common.data.__main__"
        parse = argparse.ArgumentParser.parse_args

        def stop(self, *arguments):
            parse(self, *arguments)
            raise Accepted

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Accepted):
            importlib.import_module(name).main(words[3:])


@pytest.mark.parametrize("words", PRINTED)
def test_printed_commands_are_accepted(words, monkeypatch, capsys):
    accept(words, monkeypatch)


@pytest.mark.parametrize(
    "wrong",
    [
        "make tests",
        "python examples/none.py",
        "python -m experiments.compare",
        "python -m experiments.launch --config=experiments/jepa/configs/mnist.py --config.optim.rate=1",
    ],
)
def test_a_wrong_command_is_found(wrong, monkeypatch, capsys):
    with pytest.raises((AssertionError, SystemExit)):
        accept(wrong.split(), monkeypatch)


def settings() -> set[str]:
    """The full name of every setting of every config."""
    names = set()
    for path in (ROOT / "experiments").glob("*/configs/*.py"):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if hasattr(module, "get_config") and path.stem not in ("base", "released"):
            names |= settings_of(module.get_config("").to_dict()).keys()
    return names


def test_named_settings_exist():
    text = "".join(path.read_text() for path in DOCUMENTS if path != JOURNAL)
    named = set(re.findall(r"--(config\.[\w.]*\w)", text))
    assert "config.optim.auto" in named and named - settings() == set()


def tree() -> set[str]:
    """The paths that the tree of WORKSPACE.md names."""
    block = re.findall(r"^```\n(.*?)^```$", (ROOT / "WORKSPACE.md").read_text(), re.DOTALL | re.M)[0]  # fmt: skip
    paths, above = set(), []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = line.strip().partition("  ")[0].split()
        above = [*above[:depth], names[0].rstrip("/")]
        paths |= {"/".join([*above[:-1], name]) for name in names}
    return paths


def test_the_tree_names_every_folder_and_module_and_nothing_else():
    listed = subprocess.run(
        ["git", "ls-files", *PACKAGES, "examples"], cwd=ROOT, capture_output=True, text=True
    )
    files = [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).exists()]
    there = {str(f) for f in files if f.suffix == ".py" and f.name != "__init__.py"}
    there |= {f"{folder}/" for f in files for folder in f.parents if str(folder) != "."}
    named = tree()
    assert there - named == set(), "add these to WORKSPACE.md"
    assert {name for name in named if not (ROOT / name).exists()} == set(), (
        "WORKSPACE.md names these"
    )


def test_the_citation_names_the_three_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    titles = " ".join(paper["title"] for paper in citation["references"])
    assert citation["type"] == "software" and len(citation["references"]) == 3
    assert all(
        word in titles for word in ("Joint-Embedding", "Attention Sinks", "Ultimate Optimizer")
    )
