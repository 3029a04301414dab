"""Random access to records: TFDS sets, scikit-learn's digits, folders of images, arrays.

TensorFlow is never imported: tfds reads array_record files by itself, and PIL decodes.
"""

import importlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.data.folder import FolderSource, open_folder, share_files
from common.data.views import Skipping, origin
from common.images import decode_image
from common.paths import check_local

Record = dict[str, Any]

# A set whose decoded images fit in this is decoded once per process, not once per epoch: decoding
# is two thirds of the cost of a CIFAR-10 example. Enough for MNIST and CIFAR, not for ImageNet.
CACHE_BYTES = 512 * 2**20

# Importing the module registers the builder with tfds; its `prepare(data_dir)` writes the set.
OWN_BUILDERS = {"scenes": "common.datasets.scenes.builder"}


class Source(Protocol):
    """Random access to examples: {"image": uint8 [H, W, 3], "label": int, ...other int labels}.

    A label of -1 says that the example has none.

    Must pickle, for workers, and be safe to read from a thread. May offer `__getitems__(indices)`,
    a bulk read, and `identity`, JSON-able entries that tell its contents from others'. Records are
    read-only: a source may hand out the same one again.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Record: ...


def open_source(
    name: str,
    split: str = "train",
    data_dir: str | None = None,
    *,
    skip_bad: bool = False,
    held_out: float = 0.0,
) -> Source:
    """Opens a dataset by name.

    name: "digits" (scikit-learn's, 8 x 8; every fifth is "test"), "folder:/path" (see
        `common.data.folder`), "scenes" (our own renderings), or any TFDS name such as "cifar10" or
        "imagenet2012" that was prepared as array_record files.
    split: for TFDS also a slice such as "train[:10%]".
    data_dir: where TFDS sets lie; default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    skip_bad: go on without images that cannot be read, see `common.data.views.Skipping`; the default
        is an error that names the image, when a folder is opened or when the image is met.
    held_out: for a folder with no test images of its own, the share that is set aside as "test".

    Images become RGB of 8 bits (`common.images`). The labels of a TFDS set are its ClassLabel
    features ("count", "distance" and "shape" for scenes), or, where it has none, its integer ones but
    those that number the records ("id", "index", "image_id", ...). -1 stands for no label.

    Raises FileNotFoundError with the command that prepares a missing set, ValueError for an
    unknown split or unusable contents.
    """
    if name.startswith("folder:"):
        folder = name.removeprefix("folder:")
        check_local(folder, "folder")
        source = open_folder(folder, split, skip_bad=skip_bad, held_out=held_out)
    elif name == "digits":
        return _open_digits(split)
    else:
        source = _open_tfds(name, split, data_dir)
    return Skipping(source) if skip_bad else source


def overlapping(a: Source, b: Source) -> bool:
    """Whether two sources of `open_source` or `array_source` share records.

    As far as names tell, and for folders the files: links to one file are found, copies of it are not.
    """
    a, b = origin(a), origin(b)
    if isinstance(a, TfdsSource) and isinstance(b, TfdsSource):
        return a.identity["name"] == b.identity["name"] and any(
            split == other and first < other_last and other_first < last
            for split, first, last in a.spans
            for other, other_first, other_last in b.spans
        )
    if isinstance(a, FolderSource) and isinstance(b, FolderSource):
        same = os.path.realpath(a.root) == os.path.realpath(b.root)
        return (same and (a.part == b.part or not (a.part and b.part))) or share_files(a, b)
    return a is b or (
        isinstance(a, ArraySource) and isinstance(b, ArraySource) and a.identity == b.identity
    )


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

    digits: Any = load_digits()
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
    spans: tuple[tuple[str, int, int], ...] = ()  # the records, as (split, first, last + 1)
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
                name = f"{self.identity['name']}, split {self.identity['split']}, record {i},"
                found[i] = {"image": decode_image(raw["image"], name)}
                found[i].update((key, int(raw[key])) for key in self.labels)
            if self._keep is None:
                self._keep = len(self) * found[missing[0]]["image"].nbytes <= CACHE_BYTES
            if self._keep:
                self._cache.update((i, found[i]) for i in missing)
        return [found[i] for i in indices]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}  # workers decode for themselves


def tfds_dir(data_dir: str | None = None) -> str:
    """The folder of the TFDS sets. Raises ValueError for a bucket: none is read."""
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
    except tfds.core.DatasetNotFoundError as e:
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
    spans = tuple(
        (i.splitname, i.from_ or 0, info.splits[i.splitname].num_examples if i.to is None else i.to)
        for i in tfds.core.ReadInstruction.from_spec(split).to_absolute(info.splits)
    )
    return TfdsSource(records, _labels(features), identity, spans)


def _labels(features: Any) -> tuple[str, ...]:
    """The features that are labels; see `open_source`."""
    from tensorflow_datasets.core.features import ClassLabel

    scalars = {
        key: f
        for key, f in features.items()
        if f.shape == () and np.issubdtype(f.np_dtype, np.integer)
    }
    classes = tuple(key for key, f in scalars.items() if isinstance(f, ClassLabel))
    return classes or tuple(key for key in scalars if not is_number(key))


def is_number(name: str) -> bool:
    """Whether a feature of this name numbers the records ("id", "index", "image_id", ...) and is no label."""
    return name.lower().split("_")[-1] in ("id", "ids", "index", "idx")
