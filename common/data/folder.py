"""A folder of images as a source.

    root/cat/1.png, root/dog/2.jpg         classes are the sub-folders, sorted: cat 0, dog 1
    root/1.png, root/2.jpg                 no labels
    root/train/..., root/val/...           splits; each laid out in one of the two ways above

Names that begin with a dot are ignored. Everything else must be an image that PIL can open: all
headers are read when the folder is opened, since one bad file would otherwise end a run days later.
"""

import os
import time
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import Progress

SPLITS = ("train", "val", "test")
_NAMED = 10  # bad files that an error lists
_THREADS = 16  # reading headers waits for the disk, not for the CPU
_QUIET_S = 2.0


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Images by path; `labels` is None for a flat folder, else each path's index in `classes`."""

    root: str
    paths: tuple[str, ...]  # relative to root, sorted
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]
    identity: dict[str, Any]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        path = os.path.join(self.root, self.paths[i])
        try:
            with Image.open(path) as image:
                record = {"image": np.asarray(image.convert("RGB"))}
        except OSError as error:  # a good header, and then less than it promised
            raise OSError(f"{path} cannot be decoded ({error}): repair or remove it") from error
        return record if self.labels is None else {**record, "label": self.labels[i]}


def open_folder(path: str, split: str = "train", *, skip_bad: bool = False) -> FolderSource:
    """Lists and checks the images of one split.

    A folder without train/, val/ and test/ is its own "train" split. With them, the classes are
    those of train/, so that labels agree between splits.

    Raises FileNotFoundError for a missing folder; ValueError for a missing split, no images, a
    class that train/ lacks, or, unless `skip_bad`, files that are not readable images.
    """
    top = Path(path).expanduser()
    if not top.is_dir():
        raise FileNotFoundError(f"no folder {top}")
    splits = [s for s in SPLITS if (top / s).is_dir()]
    if split not in (splits or ["train"]):
        raise ValueError(
            f"{top} has {' and '.join(splits) or 'no split sub-folders, so only the split train'}; "
            f"got split {split!r}"
        )
    root = top / split if splits else top
    classes = _sub_folders(root)
    if classes and "train" in splits:
        known = _sub_folders(top / "train")
        if unknown := sorted(set(classes) - set(known)):
            raise ValueError(f"{root} has classes that {top / 'train'} lacks: {unknown}")
        classes = known
    files = _files(root)
    strays = {f for f in files if classes and os.sep not in f}
    problems = {f: "lies beside the class folders, not in one" for f in strays}
    problems |= _check([f for f in files if f not in strays], root)
    if problems:
        named = "".join(f"\n  {f}: {why}" for f, why in sorted(problems.items())[:_NAMED])
        more = f"\n  and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        message = f"{len(problems)} of {len(files)} files in {root} are not usable images:"
        if not skip_bad:
            raise ValueError(
                f"{message}{named}{more}\nRemove them, or pass skip_bad=True to go on without them."
            )
        warnings.warn(f"skipped: {message}{named}{more}", stacklevel=2)
    paths = tuple(f for f in files if f not in problems)
    if not paths:
        raise ValueError(f"{root} has no images")
    of_class = {name: k for k, name in enumerate(classes)}
    labels = tuple(of_class[p.split(os.sep)[0]] for p in paths) if classes else None
    listing = "\n".join(paths).replace(os.sep, "/").encode()
    identity = {"name": "folder", "split": split, "crc32": zlib.crc32(listing)}
    return FolderSource(str(root), paths, labels, tuple(classes), identity)


def _sub_folders(root: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


def _files(root: Path) -> list[str]:
    """Paths of all files below `root`, relative to it and sorted, without hidden ones."""
    found = []
    for folder, subs, names in os.walk(root, followlinks=True):
        subs[:] = [s for s in subs if not s.startswith(".")]
        inside = os.path.relpath(folder, root)
        found += [os.path.normpath(os.path.join(inside, n)) for n in names if n[0] != "."]
    return sorted(found)


def _check(files: Sequence[str], root: Path) -> dict[str, str]:
    """Reads every header; returns what is wrong with each bad file."""
    problems = {}
    start = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool, Progress(transient=True) as progress:
        task = progress.add_task("checking images", total=len(files), visible=False)
        for done, (name, problem) in enumerate(
            zip(files, pool.map(lambda f: _problem(root / f), files), strict=True), 1
        ):
            if problem:
                problems[name] = problem
            progress.update(task, completed=done, visible=time.monotonic() - start > _QUIET_S)
    return problems


def _problem(path: Path) -> str | None:
    try:
        with Image.open(path):  # parses the header only
            return None
    except Exception as e:  # PIL's plugins raise many kinds on malformed files
        return "not an image" if isinstance(e, Image.UnidentifiedImageError) else str(e)
