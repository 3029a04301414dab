"""A workdir serves one run: who else wants it is told in a line, and who was killed does not keep it."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common import lease
from common.full_disk import NoSpaceError, is_full, no_space
from common.workdir import HELD, WorkdirError, hold
from common.writers import write_whole

ROOT = Path(__file__).parents[2]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_is_told_who_has_the_workdir_and_changes_nothing(tmp_path):
    with hold(tmp_path / "run") as folder:
        (folder / "metrics.jsonl").write_text("rows")
        before = contents(folder)
        with pytest.raises(WorkdirError) as refusal, hold(folder):
            pass
        who = f"process {os.getpid()} on {socket.gethostname()} holds it since 20"
        assert who in str(refusal.value) and str(folder) in str(refusal.value)
        assert "wait for it, stop it, or name another folder" in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert contents(folder) == before
    with hold(tmp_path / "run"):
        pass
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_folders_that_were_made_for_nothing_are_removed(tmp_path):
    with pytest.raises(KeyError), hold(tmp_path / "a" / "b" / "run"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "own").mkdir()
    with hold(tmp_path / "own"):
        pass
    assert (tmp_path / "own").is_dir()


HOLD = """
import os, sys, time
from pathlib import Path
from common import lease
if len(sys.argv) > 2:
    lease.LOCAL, lease.BEAT, lease.SETTLE = frozenset(), float(sys.argv[2]), 0.01
    lease.file_system = lambda folder: "nfs"
held = lease.Lease(Path(sys.argv[1]))
child = os.fork()  # as a data worker may be
if not child:  # the child tells, so that what it does at its start is done
    print("held", os.getpid(), flush=True)
time.sleep(60)
"""


def start_holder(path, *arguments):
    holder = subprocess.Popen(
        # From Python 3.12 on, a fork beside threads is deprecated.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", HOLD, path, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert holder.stdout is not None
    return holder, int(holder.stdout.readline().split()[1])


def test_a_run_that_was_killed_holds_nothing_though_its_children_live(tmp_path):
    holder, child = start_holder(tmp_path / HELD)
    try:
        with pytest.raises(WorkdirError, match=f"process {holder.pid} "), hold(tmp_path):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # alive
        with hold(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize("below", ["", "run", "run/seed0"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    (tmp_path / "notes").write_text("mine")
    with (
        pytest.raises(WorkdirError, match=f"{tmp_path}/notes is not a folder"),
        hold(tmp_path / "notes" / below),
    ):
        pass
    assert contents(tmp_path) == {tmp_path / "notes": b"mine"}


def test_impossible_folders_are_refused(tmp_path):
    for path in ["", "gs://bucket/run", "/proc/run", "/dev/full/run", tmp_path / ("x" * 300)]:
        with pytest.raises(WorkdirError, match=r"^(the )?workdir[ =]") as refusal, hold(path):
            pass
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EROFS, "its file system is read-only"),
        (errno.EACCES, "no permission"),
        (errno.ENOSPC, "no space is left"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_a_folder_that_cannot_be_written_is_found_out_at_the_start(
    tmp_path, monkeypatch, number, words
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)  # where a network file system tells
    with pytest.raises(WorkdirError, match=words), hold(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


# --- storage that hosts share, where locks may not bind ------------------------------------------


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.setattr(lease, "file_system", lambda folder: "nfs4")
    for name, value in {"BEAT": 0.05, "LOOKS": 4, "SETTLE": 0.01}.items():
        monkeypatch.setattr(lease, name, value)


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)


def holder(kernel="another", pid=1, sign=0):
    return lease.Holder("hostb", kernel, pid, "2026-01-01 00:00:00 UTC", "b" * 16, sign)


def test_a_silent_holder_of_another_host_is_replaced(tmp_path, shared, caplog):
    (tmp_path / HELD).write_bytes(holder().line())
    with hold(tmp_path):
        assert json.loads((tmp_path / HELD).read_bytes())["pid"] == os.getpid()
    assert "process 1 on hostb holds it since 2026" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_holder_of_another_host_that_gives_signs_is_left_alone(tmp_path, shared):
    gone = threading.Event()

    def sign():
        count = 0
        while not gone.wait(0.02):
            count += 1
            write_whole(
                tmp_path / HELD, holder(sign=count).line().decode()
            )  # no reader sees half of it

    (tmp_path / HELD).write_bytes(holder().line())
    other = threading.Thread(target=sign)
    other.start()
    try:
        with pytest.raises(WorkdirError, match="process 1 on hostb holds it"), hold(tmp_path):
            pass
    finally:
        gone.set()
        other.join()
    assert json.loads((tmp_path / HELD).read_bytes())["host"] == "hostb"


def test_without_locks_a_holder_signs_and_is_seen(tmp_path, shared, no_locks):
    with hold(tmp_path):
        until = time.monotonic() + 10
        while json.loads((tmp_path / HELD).read_bytes())["sign"] < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        with pytest.raises(WorkdirError, match=f"process {os.getpid()} "), hold(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_dead_process_of_this_host_is_replaced_at_once(
    tmp_path, shared, no_locks, caplog
):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / HELD).write_bytes(holder(lease._kernel(), dead.pid).line())
    with hold(tmp_path):
        pass
    assert "waiting" not in caplog.text


def test_of_two_that_come_at_once_the_first_gives_way(tmp_path, shared, no_locks, monkeypatch):
    line = holder().line()
    monkeypatch.setattr(time, "sleep", lambda _: (tmp_path / HELD).write_bytes(line))
    with pytest.raises(WorkdirError, match="hostb"), hold(tmp_path):
        pass
    assert (tmp_path / HELD).read_bytes() == line


def test_a_run_that_lost_its_workdir_while_it_slept_ends(tmp_path):
    run, child = start_holder(tmp_path / HELD, "0.1")
    try:
        (tmp_path / HELD).write_bytes(holder().line())
        assert run.wait(timeout=30) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        run.kill()
        _, errors = run.communicate()
    assert errors == (
        "error: this run has lost its folder: process 1 on hostb holds it since 2026-01-01 00:00:00 UTC; it ends here\n"
    )
    assert json.loads((tmp_path / HELD).read_bytes())["host"] == "hostb"


def test_a_torn_file_is_no_holder_once_it_is_silent(tmp_path, shared):
    (tmp_path / HELD).write_bytes(holder().line()[:30])
    with hold(tmp_path):
        pass


def test_the_kind_of_a_file_system_is_known():
    if not Path("/proc/self/mountinfo").exists():
        pytest.skip("no list of mounts here")
    assert lease.file_system(Path("/proc")) == "proc"


# --- a full disk ---------------------------------------------------------------------------------

TEXT = "RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 3: No space left on device [os_error_code='28']"


def caused(error, by):
    error.__cause__ = by
    return error


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    ValueError(TEXT),  # as tensorstore says it
    caused(AttributeError("no fileno"), OSError(errno.ENOSPC, "full")),
    ExceptionGroup("both", [KeyError("x"), OSError(errno.ENOSPC, "full")]),
]


@pytest.mark.parametrize("error", FULL, ids=lambda e: type(e).__name__)
def test_a_full_disk_is_one_plain_line(tmp_path, error):
    with pytest.raises(NoSpaceError) as refusal, hold(tmp_path):
        raise error
    assert str(refusal.value) == (
        f"no space left on {tmp_path}: free some and start the same command again"
    )


def test_a_disk_that_is_full_elsewhere_is_named(tmp_path):
    with pytest.raises(NoSpaceError, match="no space left on /elsewhere/x:"), hold(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere/x")
    with pytest.raises(NoSpaceError, match=f"no space left on {tmp_path}:"), hold(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", f"{tmp_path}/x")


def test_what_the_disk_was_full_for_is_not_hidden_by_what_failed_after_it(tmp_path):
    with pytest.raises(NoSpaceError, match="checkpoint is step 4"), hold(tmp_path):
        try:
            raise no_space(FULL[0], tmp_path, "the last good checkpoint is step 4") from FULL[0]
        finally:
            raise OSError(errno.ENOSPC, "and no picture")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "disk"), MemoryError(), ValueError("x")])
def test_other_errors_are_left_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, hold(tmp_path):
        raise error
    assert caught.value is error and not is_full(error)
