"""An address of a bucket is never taken for a local folder called "gs:"."""

from pathlib import Path

import pytest

from common.checkpoint import Checkpointer, read_meta
from common.data import open_source
from common.paths import check_local

BUCKET = "gs://bucket/run"
ADDRESSES = [
    BUCKET, Path(BUCKET), "s3://b/x", Path("s3://b/x"), "file:///tmp/x", "/here/gs:/b/x", "abfss://b/x", "memory://x",
]  # fmt: skip


@pytest.mark.parametrize("path", ADDRESSES, ids=str)
def test_an_address_is_refused_with_the_remedy(path):
    with pytest.raises(ValueError, match=r"--workdir=.*:/.*Mount the bucket"):
        check_local(path, "--workdir")


@pytest.mark.parametrize("path", ["runs/a", "/a:b/c", "C:/runs", "~/x", "lr=1:2/x", Path("."), ""])
def test_a_path_passes(path):
    check_local(path, "--workdir")


@pytest.mark.parametrize("directory", [BUCKET, Path(BUCKET)], ids=str)
def test_checkpoints_are_refused_before_anything_is_made(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (Checkpointer, read_meta):
        with pytest.raises(ValueError, match="checkpoint directory=gs:"):
            use(directory)
    assert not list(tmp_path.iterdir())


def test_data_on_a_bucket_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/tfds")
    with pytest.raises(ValueError, match="TFDS_DATA_DIR=gs://bucket/tfds: not a path"):
        open_source("mnist")
    with pytest.raises(ValueError, match="data_dir=s3://b/tfds: not a path"):
        open_source("mnist", data_dir="s3://b/tfds")
    with pytest.raises(ValueError, match="folder=gs://b/images: not a path"):
        open_source("folder:gs://b/images")
