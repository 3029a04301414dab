"""A folder of images as a source.

    root/cat/1.png, root/dog/2.jpg         classes are the sub-folders with files, sorted: cat 0, dog 1
    root/1.png, root/2.jpg                 no labels
    root/train/..., root/val/...           splits; each laid out in one of the two ways above

Split "test" is test/ or else val/ or validation/, and likewise the other two. Where there is none of
them, `held_out` sets a share of the images aside: which ones, a hash of each path decides, so that
they stay the same when files are added.

Names that begin with a dot are ignored. Everything else must be an image that PIL can open: all
headers are read when the folder is opened. An image that is damaged behind its header is met later.

The identity of a folder holds the path and the size of each image. So a run does not go on where an
image came, went, or gave way to one of another size; one of the same size is not noticed.
"""

import hashlib
import logging
import math
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import Progress

from common.images import SKIP_ADVICE, UnreadableFile, decode_image, printable
from common.progress import draws_bars

EVALUATION_SPLITS = ("test", "val", "validation")
SPLITS = ("train", *EVALUATION_SPLITS)
_NAMED = 10  # bad files that an error lists
_THREADS = 16  # reading headers waits for the disk, not for the CPU
_QUIET_S = 2.0

log = logging.getLogger("triptych")


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Images by path.

    root: what `paths` are relative to.
    labels: each path's index in `classes`; None for a flat folder.
    part: "kept" or "held out" where a share was set aside; "" for all images of `root`.
    left_out: files that were skipped when the folder was opened.
    inodes: u64[images, 2], device and inode of the file behind each path: equal for links to one file.
    """

    root: str
    paths: tuple[str, ...]  # sorted
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]
    identity: dict[str, Any]
    part: str = ""
    left_out: int = 0
    inodes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint64), repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        path = os.path.join(self.root, self.paths[i])
        try:
            encoded = Path(path).read_bytes()
        except OSError as error:  # the storage's fault, not the image's: never skipped
            why = error.strerror or error
            raise UnreadableFile(f"{printable(path)} cannot be read now: {why}") from error
        record: dict[str, np.ndarray | int] = {"image": decode_image(encoded, printable(path))}
        if self.labels is not None:
            record["label"] = self.labels[i]
        return record


def open_folder(
    path: str, split: str = "train", *, skip_bad: bool = False, held_out: float = 0.0
) -> FolderSource:
    """Lists and checks the images of one split.

    The classes of all splits are those of train/, where there is one, so that labels agree.

    Args:
      split: "train", "test", "val" or "validation". A folder without sub-folders of these names is
        its own "train".
      skip_bad: leave out files that are no images, with a warning.
      held_out: share in [0, 1) of the training images that is "test", and not "train", where the
        folder has no split to test on.

    Raises FileNotFoundError for a missing folder; ValueError for a missing split, no images, a
    class that train/ lacks, or, unless `skip_bad`, files that are not readable images.
    """
    top = Path(path).expanduser()
    if not top.is_dir():
        raise FileNotFoundError(f"no folder {printable(str(top))}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out}: a share of the images, at least 0 and below 1")
    root, part = _find_split(top, split, held_out)
    if root != top and (others := _beside_splits(top)):
        log.warning("%s: only the split folders are read, not %s", printable(str(top)), others)
    files, classes = _files(root), _classes(root)
    if classes and (top / "train").is_dir() and root != top / "train":
        classes = _known_classes(classes, root, top / "train")
    files, facts, left_out = _usable(root, files, bool(classes), skip_bad)
    if not files:
        raise ValueError(f"{printable(str(root))} has no images")
    if part:
        mine = _part(files, part, held_out)
        chosen, total = [mine(f) for f in files], len(files)
        files, facts = list(compress(files, chosen)), facts[chosen]
        left_out = list(filter(mine, left_out))
        if not files:
            raise ValueError(
                f"{printable(str(root))} has no image left to train on: held_out={held_out:g} sets all "
                f"aside for the test, of {total} in all. Add images, or lower held_out."
            )
    of_class = {name: k for k, name in enumerate(classes)}
    labels = tuple(of_class[f.split(os.sep)[0]] for f in files) if classes else None
    crc32 = _crc32(files, facts[:, 0])
    identity: dict[str, Any] = {"name": "folder", "split": split, "crc32": crc32}
    if part:
        identity["held_out"] = held_out
        what = "are held out" if part == "held out" else "are left, the others are held out"
        log.info("%s has no split to test on: %s images %s (held_out=%g)",
                 printable(str(top)), f"{len(files):,}", what, held_out)  # fmt: skip
    return FolderSource(
        str(root), tuple(files), labels, tuple(classes), identity, part, len(left_out), facts[:, 1:]
    )


def share_files(a: FolderSource, b: FolderSource) -> bool:
    """Whether an image of `a` and one of `b` are one file, by its path, a link or a hard link."""
    ours, theirs = (x.inodes[x.inodes[:, 1] > 0] for x in (a, b))  # 0: not numbered here
    ours = ours[np.isin(ours[:, 1], theirs[:, 1])]
    theirs = theirs[np.isin(theirs[:, 1], ours[:, 1])]
    return not set(map(tuple, ours.tolist())).isdisjoint(map(tuple, theirs.tolist()))


def _known_classes(classes: Sequence[str], root: Path, train: Path) -> list[str]:
    """The classes of train/. Raises ValueError where `classes`, those of `root`, are not among them."""
    known = _classes(train)
    if unknown := sorted(set(classes) - set(known)):
        raise ValueError(
            f"{printable(str(root))} has classes that {printable(str(train))} lacks: "
            f"{[printable(name) for name in unknown]}"
        )
    return known


def _crc32(files: Sequence[str], sizes: np.ndarray) -> int:
    listing = "".join(f"{file}\0{size}\0" for file, size in zip(files, sizes.tolist()))
    return zlib.crc32(listing.replace(os.sep, "/").encode("utf-8", "surrogateescape"))


def folder_splits(path: str) -> list[str]:
    """The splits that a folder has of its own."""
    top = Path(path).expanduser()
    return [s for s in SPLITS if (top / s).is_dir()] or ["train"]


def _find_split(top: Path, split: str, held_out: float) -> tuple[Path, str]:
    """The folder of a split, and which part of its images: "kept", "held out", or "" for all."""
    there = [s for s in SPLITS if (top / s).is_dir()]
    to_test = [s for s in EVALUATION_SPLITS if s in there]
    train = top / "train" if there else top
    if split in there or (split == "train" and not there):
        kept = split == "train" and not to_test and held_out
        return (top / split if there else top), "kept" if kept else ""
    if split in EVALUATION_SPLITS and to_test:
        log.info("%s has no %s/: its %s/ is taken", printable(str(top)), split, to_test[0])
        return top / to_test[0], ""
    if split in EVALUATION_SPLITS and train.is_dir() and held_out:
        return train, "held out"
    has = " and ".join(there) or "no split sub-folders, so only the split train"
    advice = ""
    if split in EVALUATION_SPLITS:
        advice = (
            "; make one, or set a share of the images aside: held_out=0.1 "
            "(--config.data.held_out=0.1 in I-JEPA's configs)"
        )
    raise ValueError(f"{printable(str(top))} has {has}; got split {split!r}{advice}")


def _beside_splits(top: Path) -> str:
    """The folders next to train/, val/ and test/: in an unsplit folder with a class of such a name, its other classes."""
    others = [e.name for e in os.scandir(top) if e.is_dir() and e.name not in SPLITS]
    return ", ".join(printable(name) for name in sorted(others)[:_NAMED] if name[0] != ".")


def _part(files: Sequence[str], part: str, held_out: float) -> Callable[[str], bool]:
    """Whether a path is of a part; one of `files` at least is held out, so that few are enough to try."""
    least = min(map(_rank, files), default=0.0)
    limit = max(held_out, math.nextafter(least, 1))
    return lambda file: (_rank(file) < limit) == (part == "held out")


def _rank(file: str) -> float:
    """A number in [0, 1) that depends on the path only."""
    name = file.replace(os.sep, "/").encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=6).digest()) / 2**48


def _classes(root: Path) -> list[str]:
    """The sub-folders that hold files, sorted; empty ones are logged."""
    folders = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    empty = [name for name in folders if not _has_file(root / name)]
    if empty:
        names = ", ".join(printable(name) for name in empty[:_NAMED])
        more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        log.warning("%s: empty folders are no classes: %s%s", printable(str(root)), names, more)
    return [name for name in folders if name not in set(empty)]


def _has_file(folder: Path) -> bool:
    return any(name[0] != "." for _, names in _folders(str(folder)) for name in names)


def _usable(
    root: Path, files: Sequence[str], with_classes: bool, skip_bad: bool
) -> tuple[list[str], np.ndarray, list[str]]:
    """The files that are images by their headers, u64[files, 3] of `_look`, and the others, which are left out.

    Raises ValueError if there are others, unless `skip_bad`.
    """
    strays = {f for f in files if with_classes and os.sep not in f}
    problems = {f: "lies next to the class folders, not in one" for f in strays}
    found, facts = _check([f for f in files if f not in strays], root)
    problems |= found
    if problems:
        listed = sorted(problems.items())[:_NAMED]
        named = "".join(f"\n  {printable(f)}: {why}" for f, why in listed)
        more = f"\n  and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        message = f"{len(problems)} of {len(files)} files in {printable(str(root))} are not usable images:"
        if not skip_bad:
            advice = SKIP_ADVICE.replace("without it", "without them")
            raise ValueError(f"{message}{named}{more}\nRemove them, or {advice}.")
        warnings.warn(f"skipped: {message}{named}{more}", stacklevel=3)
    good = [f not in found for f in files if f not in strays]
    return [f for f in files if f not in problems], facts[good], list(problems)


def _files(root: Path) -> list[str]:
    """Paths of all files below `root`, relative to it and sorted, without hidden ones."""
    found = []
    for folder, names in _folders(str(root)):
        inside = os.path.relpath(folder, root)
        found += [os.path.normpath(os.path.join(inside, n)) for n in names if n[0] != "."]
    return sorted(found)


def _folders(root: str) -> Iterator[tuple[str, list[str]]]:
    """Each real folder below `root` once, with its files: folders first, and then what links lead to.

    So a link to a folder that is listed anyway, such as a cycle, adds nothing.
    """
    above = os.path.realpath(root)
    todo, seen = [root], set()
    while todo:
        links = []
        for start in todo:
            real = os.path.realpath(start)
            if start != root and os.path.commonpath([real, above]) == real:
                continue  # a link to a folder around `root`: all of the disk, at worst
            for folder, subs, names in os.walk(start, onerror=_refuse):
                info = os.stat(folder)
                if (info.st_dev, info.st_ino) in seen:
                    subs[:] = []
                    continue
                seen.add((info.st_dev, info.st_ino))
                subs[:] = sorted(s for s in subs if not s.startswith("."))
                paths = [os.path.join(folder, s) for s in subs]
                links += [p for p in paths if os.path.islink(p)]
                yield folder, names
        todo = links


def _refuse(error: OSError) -> None:
    raise ValueError(f"cannot list {printable(str(error.filename))}: {error.strerror}") from error


def _check(files: Sequence[str], root: Path) -> tuple[dict[str, str], np.ndarray]:
    """Reads every header; returns what is wrong with each bad file, and u64[files, 3] of `_look`."""
    problems, facts = {}, np.zeros((len(files), 3), np.uint64)
    start = time.monotonic()
    bar = Progress(transient=True, disable=not draws_bars())
    with ThreadPoolExecutor(_THREADS) as pool, bar as progress:
        task = progress.add_task("checking images", total=len(files), visible=False)
        for done, (name, (problem, fact)) in enumerate(
            zip(files, pool.map(lambda f: _look(root / f), files), strict=True), 1
        ):
            facts[done - 1] = fact
            if problem:
                problems[name] = problem
            progress.update(task, completed=done, visible=time.monotonic() - start > _QUIET_S)
    return problems, facts


def _look(path: Path) -> tuple[str, tuple[int, int, int]]:
    """(what is wrong with an image, or ""; its file's bytes, device and inode)."""
    try:
        with open(path, "rb") as file, Image.open(file):  # parses the header only
            info = os.fstat(file.fileno())
            return "", (info.st_size, info.st_dev, info.st_ino)
    except Exception as e:  # PIL's plugins raise many kinds on malformed files
        known = isinstance(e, Image.UnidentifiedImageError)
        return "not an image" if known else printable(str(e)), (0, 0, 0)
