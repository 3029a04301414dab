"""Paths that must lie in a file system."""

import os
import re
from pathlib import PurePath

# An address of another kind, also as pathlib writes it: it makes "gs:/bucket/x" of "gs://bucket/x".
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_SCHEMES = {"gs:", "s3:", "az:", "abfs:", "abfss:", "wasb:", "wasbs:", "hdfs:", "http:", "https:", "file:"}  # fmt: skip


def check_local(path: str | os.PathLike[str], what: str) -> None:
    """Refuses an address such as gs://bucket/run, of which pathlib would make a local folder called "gs:".

    Args:
      what: whose value it is, for the message.

    Raises:
      ValueError: the path begins with a scheme, or has the folder that pathlib makes of one.
    """
    text = os.fspath(path)
    if _ADDRESS.match(text) or _SCHEMES.intersection(PurePath(text).parts):
        raise ValueError(
            f"{what}={text}: not a path of a file system. Mount the bucket (gcsfuse, Mountpoint for S3) and give the "
            "folder where it is mounted, or use a shared folder"
        )
