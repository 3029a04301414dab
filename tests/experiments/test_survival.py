"""A run that is killed, stopped or damaged on its way gives the very rows of one that was left alone."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.distributed import EXIT_PREEMPTED
from common.writers import read_metrics

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 40, 5
COMMAND = [
    *(sys.executable, "-m", "experiments.launch"),
    "--config=experiments/jepa/configs/scenes.py:smoke",
    f"--config.train.steps={STEPS}",
    f"--config.train.save_every={SAVE_EVERY}",
    "--config.train.eval_every=0",
    "--config.probe.linear=false",
    "--config.model.depth=1",  # what is tested does not depend on the model: compile little
    "--config.policy.unroll=1",
]
TIMEOUT = 900  # seconds; only so that a hanging run ends

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """All runs share their compiled programs."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # and one device
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="module")
def launch(environment):
    """Starts a run in a workdir."""

    @contextlib.contextmanager
    def launch(workdir):
        with open(workdir.with_suffix(".err"), "a+") as errors:
            child = subprocess.Popen(
                [*COMMAND, f"--workdir={workdir}"],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            try:
                yield child
            finally:
                child.kill()
                child.wait()

    return launch


def finish(launch, workdir) -> str:
    """Runs to the end; what the run, and those before it in this workdir, wrote on stderr."""
    with launch(workdir) as child:
        code = child.wait(TIMEOUT)
    text = workdir.with_suffix(".err").read_text()
    assert code == 0, text
    return text


@pytest.fixture(scope="module")
def undisturbed(launch, tmp_path_factory):
    """Rows, final result, and bytes of a checkpoint, of a run that was left alone."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(launch, workdir)
    blocks = [p.stat().st_blocks for p in (workdir / "checkpoints" / str(STEPS)).rglob("*")]
    return rows(workdir), metrics(workdir), 512 * sum(blocks)


def rows(workdir):
    clock = ("wall", "images_per_second")
    found = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in clock} for row in found]


def metrics(workdir):
    return json.loads((workdir / "result.json").read_text())["metrics"]


def saved_steps(workdir) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def wait_for_row(child, workdir, step) -> None:
    """Returns once the run has written the row of `step`, or has ended."""
    deadline = time.monotonic() + TIMEOUT
    while child.poll() is None and time.monotonic() < deadline:
        path = workdir / "metrics.jsonl"
        if path.exists() and any(row["step"] >= step for row in read_metrics(path)):
            return
        time.sleep(0.005)
    assert child.poll() is None, workdir.with_suffix(".err").read_text()


def test_sigkill_at_any_moment_leaves_no_trace(launch, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    chance = random.Random()  # where a kill falls is up to the machine's load in any case
    kills = []
    # From just before a save is due to well into the next: while it is being written, and between.
    for first in (SAVE_EVERY - 1, 4 * SAVE_EVERY - 1):
        with launch(workdir) as child:
            wait_for_row(child, workdir, first)
            delay = chance.uniform(0, 0.3)
            time.sleep(delay)
            child.kill()
            assert child.wait(TIMEOUT) == -signal.SIGKILL
        kills.append((delay, rows(workdir)[-1]["step"], saved_steps(workdir)))
    spent = json.loads((workdir / "clock.json").read_text())["jepa_pretrain"]
    text = finish(launch, workdir)
    assert "damaged" not in text and "error" not in text.lower(), (kills, text)
    assert rows(workdir) == undisturbed[0], kills
    assert metrics(workdir) == undisturbed[1], kills
    result = json.loads((workdir / "result.json").read_text())
    assert result["wall_seconds"] > spent > 0 and result["changes"] == []
    assert {"compile", "input", "step", "save"} <= result["seconds"].keys()
    assert saved_steps(workdir)[-1] == STEPS
    left = [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]
    assert left == [], "temporary directories of killed runs"


def stop(launch, workdir, step) -> int:
    """Sends SIGTERM once the row of `step` is written; the step at which the run then stopped."""
    with launch(workdir) as child:
        wait_for_row(child, workdir, step)
        child.terminate()
        code = child.wait(TIMEOUT)
    text = workdir.with_suffix(".err").read_text()
    assert code == EXIT_PREEMPTED, text
    last = rows(workdir)[-1]["step"]
    assert saved_steps(workdir)[-1] == last, "nothing that was computed is lost"
    assert f"stopped by a signal at step {last}" in text and "start the same command again" in text
    return last


def test_sigterm_saves_at_once_and_damage_costs_one_interval(launch, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    first = stop(launch, workdir, SAVE_EVERY + 2)
    newest = stop(launch, workdir, first + SAVE_EVERY + 1)
    assert f"continuing from step {first}\n" in workdir.with_suffix(".err").read_text()

    older = saved_steps(workdir)[-2]
    state = workdir / "checkpoints" / str(newest) / "state"
    largest = max((p for p in state.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    text = finish(launch, workdir)
    assert f"checkpoint {newest} is damaged" in text
    assert f"falling back to step {older}" in text and f"continuing from step {older}\n" in text
    assert rows(workdir) == undisturbed[0]
    assert metrics(workdir) == undisturbed[1]


# What the user of a small disk sees: a run, and the same command once there is more space.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=$SMALL tmpfs "$DISK" || exit 77
"$@"; echo $? > "$OUT/first.code"
cp "$DISK/run/metrics.jsonl" "$OUT/first.jsonl"
mount -o remount,size=1g "$DISK"
"$@" 2> "$OUT/again.err"; echo $? > "$OUT/again.code"
cp -r "$DISK/run" "$OUT/run"
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="mounts a small disk with unshare")
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(environment, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    checkpoint = undisturbed[2] // 1024
    ran = subprocess.run(
        ["unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, "sh", *COMMAND, f"--workdir={disk}/run"],
        cwd=ROOT,
        env=environment | {
            "DISK": str(disk), "OUT": str(tmp_path), "SMALL": f"{int(2.5 * checkpoint) + 50}k",
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )  # fmt: skip
    if not (tmp_path / "first.code").exists():
        pytest.skip(f"no file system of one's own here: {ran.stderr}")
    assert (tmp_path / "first.code").read_text() == "1\n"
    *before, error = ran.stderr.splitlines()  # those before say what is begun
    assert len(before) < 6 and "Traceback" not in ran.stderr, ran.stderr
    assert error == (
        f"error: no space left on {disk}/run: free some and start the same command again; "
        f"the last good checkpoint is step {2 * SAVE_EVERY}"
    )
    again = (tmp_path / "again.err").read_text()
    assert (tmp_path / "again.code").read_text() == "0\n", again
    assert f"continuing from step {2 * SAVE_EVERY}\n" in again and "damaged" not in again
    assert rows(tmp_path / "run") == undisturbed[0]
    assert metrics(tmp_path / "run") == undisturbed[1]
