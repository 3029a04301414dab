"""Prepares and describes datasets: `python -m common.data --help`."""

import argparse
import collections
import importlib
import io
import sys

import numpy as np
from PIL import Image

from common.data.folder import folder_splits
from common.data.sources import OWN_BUILDERS, TfdsSource, open_source, tfds_builder, tfds_dir
from common.data.views import origin, read, subset

_EPILOG = """\
examples:
  python -m common.data prepare scenes                      render our own dataset (no download)
  python -m common.data prepare cifar10 --data_dir=~/data   download from its publisher
  python -m common.data info cifar10                        splits, labels, image sizes
  python -m common.data info folder:/path/to/images         check the headers of a folder's files

Sets lie under --data_dir, else $TFDS_DATA_DIR, else ~/tensorflow_datasets. Training configs take
the same names. "digits" ships with scikit-learn and folders are read in place: neither needs
preparing. Reading never needs TensorFlow; preparing some TFDS sets does, once.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m common.data",
        description="Prepare and describe datasets.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (("prepare", "generate or download"), ("info", "describe")):
        sub = commands.add_parser(command, help=f"{text} a dataset")
        sub.add_argument("name", help="scenes, digits, folder:/path, or a TFDS name")
        sub.add_argument("--data_dir", help="folder of TFDS sets (default $TFDS_DATA_DIR)")
    sub.add_argument(
        "--skip_bad", action="store_true", help="go on without files that are no images"
    )
    args = parser.parse_args(argv)
    try:
        if args.command == "prepare":
            prepare(args.name, args.data_dir)
        else:
            info(args.name, args.data_dir, args.skip_bad)
    except (FileNotFoundError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def prepare(name: str, data_dir: str | None) -> None:
    """Writes the set as array_record files, unless it is there."""
    if name == "digits" or name.startswith("folder:"):
        print(f"{name} needs no preparing")
        return
    if name in OWN_BUILDERS:
        importlib.import_module(OWN_BUILDERS[name]).prepare(tfds_dir(data_dir))
    builder = tfds_builder(name, data_dir, file_format="array_record")
    try:
        builder.download_and_prepare()
    except ModuleNotFoundError as e:
        if e.name is None or not e.name.startswith("tensorflow"):
            raise
        raise ValueError(
            f"TFDS needs TensorFlow to prepare {name} (not to read it). Run this command once "
            "where `pip install tensorflow` is possible and copy the folder."
        ) from e
    print(f"{builder.info.full_name} is in {builder.data_dir}")


def info(name: str, data_dir: str | None, skip_bad: bool = False) -> None:
    """Prints the splits, and what the records of the first one hold."""
    splits = ["train", "test"]
    if name.startswith("folder:"):
        splits = folder_splits(name.removeprefix("folder:"))
    elif name != "digits":
        splits = list(tfds_builder(name, data_dir).info.splits) or ["train"]
    sources = {s: open_source(name, s, data_dir, skip_bad=skip_bad) for s in splits}
    print(f"{name}: " + ", ".join(f"{split} {len(s):,}" for split, s in sources.items()))
    source = next(iter(sources.values()))
    print(f"identity: {origin(source).identity}")
    sample = read(subset(source, 500), range(min(500, len(source))))
    for key, value in sample[0].items():
        if np.ndim(value):
            shapes = collections.Counter(np.shape(r[key]) for r in sample).most_common(3)
            print(f"  {key}: {value.dtype} " + ", ".join(str(list(shape)) for shape, _ in shapes))
        else:
            values = [int(r[key]) for r in sample]
            print(f"  {key}: {min(values)} to {max(values)} in a sample of {len(values)}")
    source = origin(source)
    if isinstance(source, TfdsSource):
        encoded = source.records[0]["image"]
        print(f"  stored as {Image.open(io.BytesIO(encoded)).format}, {len(encoded):,} bytes")


if __name__ == "__main__":
    sys.exit(main())
