"""Random access to records: TFDS sets, scikit-learn's digits, folders of images, arrays.

TensorFlow is never imported: tfds reads array_record files by itself, and PIL decodes.
"""

import importlib
import io
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from common.data.folder import open_folder
from common.paths import check_local

Record = dict[str, Any]

# A set whose decoded images fit in this is decoded once per process, not once per epoch: decoding
# is two thirds of the cost of a CIFAR-10 example. Enough for MNIST and CIFAR, not for ImageNet.
CACHE_BYTES = 512 * 2**20

# Importing the module registers the builder with tfds; its `prepare(data_dir)` writes the set.
OWN_BUILDERS = {"scenes": "common.datasets.scenes.builder"}


class Source(Protocol):
    """Random access to examples: {"image": uint8 [H, W, 3], "label": int, ...other int labels}.

    Must pickle, for workers, and be safe to read from a thread. May offer `__getitems__(indices)`,
    a bulk read, and `identity`, JSON-able entries that tell its contents from others'. Records are
    read-only: a source may hand out the same one again.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Record: ...


def open_source(
    name: str, split: str = "train", data_dir: str | None = None, *, skip_bad: bool = False
) -> Source:
    """Opens a dataset by name.

    name: "digits" (scikit-learn's, 8 x 8; every fifth is "test"), "folder:/path" (see
        `common.data.folder`), "scenes" (our own renderings), or any TFDS name such as "cifar10" or
        "imagenet2012" that was prepared as array_record files.
    split: for TFDS also a slice such as "train[:10%]".
    data_dir: where TFDS sets lie; default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    skip_bad: for folders, skip unreadable files with a warning where the default is an error.

    Grey images become RGB. Every integer feature is kept under its name ("label", or "count",
    "distance" and "shape" for scenes); other features are dropped.

    Raises FileNotFoundError with the command that prepares a missing set, ValueError for an
    unknown split or unusable contents.
    """
    if name.startswith("folder:"):
        check_local(name.removeprefix("folder:"), "folder")
        return open_folder(name.removeprefix("folder:"), split, skip_bad=skip_bad)
    if name == "digits":
        return _open_digits(split)
    return _open_tfds(name, split, data_dir)


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Equally long arrays in memory; record i holds the i-th entry of each."""

    arrays: dict[str, np.ndarray]
    identity: dict[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, i: int) -> Record:
        return {name: array[i] for name, array in self.arrays.items()}


def array_source(**arrays: np.ndarray) -> ArraySource:
    """A source over arrays in memory, e.g. `array_source(image=images, label=labels)`."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if not arrays or len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"arrays must have one common length of at least 1, got {lengths}")
    checksum = 0
    for name, array in sorted(arrays.items()):
        header = f"{name} {array.dtype} {array.shape}".encode()
        checksum = zlib.crc32(array.tobytes(), zlib.crc32(header, checksum))
    return ArraySource(arrays, {"name": "arrays", "crc32": checksum})


def _open_digits(split: str) -> ArraySource:
    if split not in ("train", "test"):
        raise ValueError(f"digits has the splits train and test, got {split!r}")
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 4) == (split == "test")
    gray = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)  # 0..16 to 0..255
    arrays = {
        "image": np.repeat(gray[..., None], 3, axis=-1),
        "label": digits.target[chosen].astype(np.int32),
    }
    return ArraySource(arrays, {"name": "digits", "version": "1", "split": split})


@dataclass(eq=False)
class TfdsSource:
    """A TFDS data source whose images are still encoded: decodes, and keeps a set that is small."""

    records: Any
    labels: tuple[str, ...]
    identity: dict[str, Any]
    _cache: dict[int, Record] = field(default_factory=dict, repr=False)
    _keep: bool | None = None  # whether the set fits the cache; known after the first image

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Record:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        found = {i: self._cache[i] for i in indices if i in self._cache}
        missing = [i for i in dict.fromkeys(indices) if i not in found]
        if missing:
            for i, raw in zip(missing, self.records.__getitems__(missing), strict=True):
                found[i] = {"image": decode_image(raw["image"])}
                found[i].update((key, int(raw[key])) for key in self.labels)
            if self._keep is None:
                self._keep = len(self) * found[missing[0]]["image"].nbytes <= CACHE_BYTES
            if self._keep:
                self._cache.update((i, found[i]) for i in missing)
        return [found[i] for i in indices]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}  # workers decode for themselves


def decode_image(encoded: bytes) -> np.ndarray:
    """PNG, JPEG, ... to read-only uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(encoded)) as image:
        array = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    array.flags.writeable = False
    return array


def tfds_dir(data_dir: str | None = None) -> str:
    """Where TFDS sets lie. Raises ValueError for a bucket, of which nothing is read."""
    # tfds reads the variable once, at import; users also set it later, in notebooks and tests
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    check_local(chosen, "data_dir" if data_dir else "TFDS_DATA_DIR")
    return str(Path(chosen).expanduser())


def tfds_builder(name: str, data_dir: str | None = None, **kwargs: Any) -> Any:
    """The TFDS builder of `name`, ours included. Raises ValueError for a name that none has."""
    import tensorflow_datasets as tfds

    if name.split("/")[0] in OWN_BUILDERS:
        importlib.import_module(OWN_BUILDERS[name.split("/")[0]])
    data_dir = tfds_dir(data_dir)
    try:
        return tfds.builder(name, data_dir=data_dir, **kwargs)
    except tfds.core.registered.DatasetNotFoundError as e:
        raise ValueError(
            f"unknown dataset {name!r}: neither 'digits', 'scenes' nor 'folder:/path', no TFDS "
            f"name, and no prepared set under {data_dir}"
        ) from e


def _open_tfds(name: str, split: str, data_dir: str | None) -> TfdsSource:
    import tensorflow_datasets as tfds

    builder = tfds_builder(name, data_dir)
    info = builder.info
    if not info.splits:
        where = tfds_dir(data_dir)
        raise FileNotFoundError(
            f"dataset {name!r} is not in {where}. Prepare it with\n"
            f"  python -m common.data prepare {name} --data_dir={where}\n"
            "or, if it lies elsewhere, set TFDS_DATA_DIR to the folder that contains it."
        )
    if split.split("[")[0] not in info.splits:
        raise ValueError(f"{name} has the splits {sorted(info.splits)}, got {split!r}")
    features = info.features
    if "image" not in features or features["image"].np_dtype != np.uint8:
        raise ValueError(
            f"{name} has no uint8 'image' feature, its features are {sorted(features)}; write a "
            "Source for it, which needs just __len__ and __getitem__"
        )
    labels = tuple(
        key
        for key, f in features.items()
        if f.shape == () and np.issubdtype(f.np_dtype, np.integer)
    )
    decoders = {"image": tfds.decode.SkipDecoding()}  # tfds's own decoding logs and is no faster
    try:
        records = builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as e:
        raise ValueError(
            f"{builder.data_dir} is not stored as array_record, which random access needs. Prepare "
            f"it again with\n  python -m common.data prepare {name} --data_dir=DIR"
        ) from e
    # Some copies re-encode images under the official version number; the size tells them apart.
    size = info.splits[split.split("[")[0]].num_bytes
    identity = {"name": info.full_name, "split": split, "bytes": int(size)}
    if len(records) == 0:
        raise ValueError(f"{info.full_name} split {split!r} has no examples")
    return TfdsSource(records, labels, identity)
