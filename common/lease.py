"""Who holds a folder: a lock of the kernel, and a file that says whose it is.

A killed process loses the lock at once. On storage that hosts share, such locks may be missing or
end at the host; there the holder also signs the file every ten seconds, and another host that finds
the file takes over when no sign has come for a minute. No clocks are compared.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import itertools
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

log = logging.getLogger("triptych")

BEAT = 10.0  # seconds between two signs of a holder on shared storage
LOOKS = 6  # in a row, one a beat, that find no new sign: then the holder counts as gone
SETTLE = 1.0  # seconds after which two that took shared storage at once see who came last
# On file systems of any other kind, or of unknown options, a lock may not bind the other hosts.
LOCAL = frozenset((
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "vfat", "exfat", "ntfs3", "tmpfs",
    "ramfs", "overlay", "aufs",
))  # fmt: skip
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class HeldError(RuntimeError):
    """Another process, which the message names, holds the folder."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """A line of JSON. `kernel` is the same for processes that see each other's process numbers."""

    host: str
    kernel: str
    pid: int
    since: str
    token: str
    sign: int = 0

    def line(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"


class Lease:
    """Holds the file `path` for this process, from here to `release`.

    A holder whose host slept while another took over ends its process, with exit code 1 and a line
    on stderr, as soon as it wakes: what it wrote from then on would be in the other's files.

    Raises:
      HeldError: another process holds it.
      OSError: the file cannot be written.
    """

    def __init__(self, path: Path):
        self.path, self._pid = path, os.getpid()
        since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self.me = Holder(socket.gethostname(), _kernel(), self._pid, since, secrets.token_hex(8))
        self._is_local = file_system(path.parent) in LOCAL | {""}
        self._gone = threading.Event()
        self._signing = threading.Thread(target=self._sign, daemon=True, name="lease")
        self._fd, self._binding = self._take()
        _locked.add(self._fd)
        try:
            _write(self._fd, self.me)
            if not self._binding:
                time.sleep(SETTLE)
                if (now := read(path)) != self.me.line():
                    raise _held(now)
                self._signing.start()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Removes the file, if it is this process's, and the lock."""
        if os.getpid() != self._pid:  # a forked child on its way out
            return
        self._gone.set()
        if self._signing.is_alive():
            self._signing.join(BEAT)
        with contextlib.suppress(OSError):
            is_locked = self._binding and _is(self._fd, self.path)
            if is_locked or token(read(self.path)) == self.me.token:
                self.path.unlink()  # before the lock goes: after, it may be the next one's
        _locked.discard(self._fd)
        os.close(self._fd)

    def _take(self) -> tuple[int, bool]:
        """A descriptor of the file, locked where there are locks; and whether that lock binds everybody."""
        first = None
        for look in itertools.count():
            fd, locked, line = self._open()
            binding = self._is_local and locked is not None
            first = line if first is None else first
            silent = look >= LOOKS and line == first and locked is not False
            if silent or self._is_free(locked, binding, line):
                return fd, binding
            os.close(fd)
            if binding or line != first or look >= 2 * LOOKS:
                raise _held(line)
            if look == 0:
                log.warning("%s; waiting up to %.0f s for a sign of it", _held(line), BEAT * LOOKS)
            time.sleep(BEAT)
        raise AssertionError

    def _open(self) -> tuple[int, bool | None, bytes]:
        """A descriptor, whether it has the file's lock (None: there are no locks here), and what is in the file."""
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                locked = _lock(fd)
                if locked is not True or _is(fd, self.path):  # else its holder removed it just now
                    return fd, locked, read(self.path)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _is_free(self, locked: bool | None, binding: bool, line: bytes) -> bool:
        """Whether nobody holds the file, by what the kernel itself knows."""
        if locked is False or (locked and binding) or not line:
            return locked is not False
        holder = _parsed(line)
        if holder is None or holder.kernel != self.me.kernel:
            return False
        return locked is True or not _is_alive(holder.pid)

    def _sign(self) -> None:
        me = self.me
        while not self._gone.wait(BEAT):
            me = dataclasses.replace(me, sign=me.sign + 1)
            with contextlib.suppress(OSError):  # storage that is away for a while
                line = read(self.path)
                if line and token(line) not in (me.token, ""):
                    _end(line)
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    _write(fd, me)
                finally:
                    os.close(fd)


def read(path: Path) -> bytes:
    """What a lease's file says, b"" without one. By name: opening asks the server, where a descriptor may not."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def token(line: bytes) -> str:
    """The token of a lease's line; "" where it is torn."""
    holder = _parsed(line)
    return holder.token if holder else ""


def file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, such as "ext4" or "nfs4"; "" if unknown."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for fields in map(str.split, mounts):
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return ""


def _write(fd: int, holder: Holder) -> None:
    line = holder.line()
    os.pwrite(fd, line, 0)
    os.ftruncate(fd, len(line))
    os.fsync(fd)


def _lock(fd: int) -> bool | None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise


def _is(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _parsed(line: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _held(line: bytes) -> HeldError:
    holder = _parsed(line)
    if holder is None:
        return HeldError("another process holds it")
    return HeldError(f"process {holder.pid} on {holder.host} holds it since {holder.since}")


def _end(line: bytes) -> None:
    print(
        f"error: this run has lost its folder: {_held(line)}; it ends here",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


_locked: set[int] = set()  # descriptors of this process that have a lock


def _forked() -> None:
    """A forked child, such as a data worker, would keep the lock when its parent is killed."""
    for fd in _locked:
        os.close(fd)
    _locked.clear()


os.register_at_fork(after_in_child=_forked)
