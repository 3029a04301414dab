"""Starting many processes as one, and stopping them together.

`initialize` joins the processes of a TPU pod, a SLURM step or explicit flags. `require_same` refuses
processes that would not compute the same. `PreemptionGuard` turns a scheduler's SIGTERM into one step
at which all processes save and exit `EXIT_PREEMPTED`.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h. Launchers read it as: saved in time, start me again."""

_DUPLICATE_SECONDS = 1.0  # schedulers and `timeout` may signal the process and its group at once
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process to its peers. Call first, before anything that touches a device.

    With arguments (all three, `coordinator` being "host:port" of process 0): those. Without: a TPU
    pod or a SLURM step of several tasks is detected, and anything else stays a single process.
    Processes on CPU talk through gloo, jax's default. Prints one line per process when several.

    Raises:
      ValueError: some but not all of the three arguments are given.
    """
    given = (coordinator, num_processes, process_id)
    if None in given and given != (None, None, None):
        raise ValueError(f"give coordinator, num_processes and process_id all or none, got {given}")
    if jax.distributed.is_initialized():
        return
    if coordinator is not None:
        jax.distributed.initialize(*given, cluster_detection_method="deactivate")
    elif _on_tpu_vm():
        try:
            jax.distributed.initialize()
        except ValueError as error:  # chips, but in no cluster jax knows of, as in Colab
            if "coordinator_address" not in str(error):
                raise
    elif all(name in os.environ for name in _SLURM) and int(os.environ["SLURM_NTASKS"]) > 1:
        jax.distributed.initialize(
            cluster_detection_method="slurm", local_device_ids=slurm_local_device_ids(os.environ)
        )
    if jax.process_count() > 1:
        kinds = ", ".join(sorted({d.device_kind for d in jax.local_devices()}))
        print(
            f"process {jax.process_index()} of {jax.process_count()}: "
            f"{jax.local_device_count()} of {jax.device_count()} devices ({kinds})",
            flush=True,
        )


def _on_tpu_vm() -> bool:
    # jax's import sets this variable where it finds TPU chips and libtpu; nothing public says so.
    platforms = jax.config.jax_platforms or "tpu"  # pyright: ignore[reportAttributeAccessIssue]  # set at run time
    return os.environ.get("TPU_ML_PLATFORM") == "JAX" and "tpu" in platforms


def slurm_local_device_ids(env: Mapping[str, str]) -> list[int]:
    """The GPUs of this task, among those it can see: an even share for each task on the node.

    One task per node gets all, one task per GPU gets its own, and a task that SLURM shows its own
    GPUs only (`--gpus-per-task`) gets those. (jax alone takes number SLURM_LOCALID, which is right
    in the second case only.) Empty, which hides no device, where there is no GPU to count.

    Raises:
      ValueError: the GPUs cannot be shared evenly.
    """
    if ids := env.get("JAX_LOCAL_DEVICE_IDS"):
        return [int(i) for i in ids.split(",")]
    visible = next(
        (env[n] for n in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES") if env.get(n)), None
    )
    on_node = int(env.get("SLURM_GPUS_ON_NODE") or 0)
    gpus = len(visible.split(",")) if visible else on_node
    tasks, task = _slurm_tasks_on_node(env), int(env["SLURM_LOCALID"])
    already_shared = gpus < max(on_node, tasks)
    if gpus == 0 or (visible and already_shared):
        return list(range(gpus))
    if gpus % tasks:
        raise ValueError(
            f"{tasks} tasks cannot share {gpus} GPUs evenly: set --ntasks-per-node to a divisor of "
            "the GPUs, or JAX_LOCAL_DEVICE_IDS in each task"
        )
    share = gpus // tasks
    return list(range(task * share, (task + 1) * share))


def _slurm_tasks_on_node(env: Mapping[str, str]) -> int:
    """SLURM_STEP_TASKS_PER_NODE reads "2(x3),1": three nodes of two tasks, then one of one."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"cannot read SLURM_STEP_TASKS_PER_NODE: {part!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[int(env.get("SLURM_NODEID", 0))]


def barrier(name: str, seconds: float = 600.0) -> None:
    """Returns once every process has called it. Call on all of them, in the same order; `name` is for the error.

    Through jax's coordination service, which touches no device. (`sync_global_devices` is a collective: on CPU, gloo
    connects a pair of processes once per local device, and now and then never finishes.)

    Raises:
      jax.errors.JaxRuntimeError: some process, which it names, has not come within `seconds`.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost  # a launch need not wait for orbax

        key = f"{name} {next(_barriers)}"
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=round(1000 * seconds))


_barriers = itertools.count()  # a key of jax's service serves once


def exchange(name: str, text: str, seconds: float = 600.0) -> list[str]:
    """The text of every process, in their order. A barrier too: call on all of them, in the same order.

    Through jax's coordination service, as `barrier`, whose errors it raises.
    """
    if jax.process_count() == 1:
        return [text]
    from jax._src.distributed import global_state  # the service's texts have no public name

    global _last_exchange
    client: Any = global_state.client
    own = jax.process_index()
    key = f"triptych/{name}/{next(_barriers)}"
    client.key_value_set(f"{key}/{own}", json.dumps(text))
    barrier(name, seconds)
    if _last_exchange:  # which every process has read, or it would not have come to this one
        client.key_value_delete(f"{_last_exchange}/{own}")
    _last_exchange = key
    found = {int(at.rpartition("/")[2]): value for at, value in client.key_value_dir_get(key)}
    return [json.loads(found[i]) for i in range(jax.process_count())]


_last_exchange = ""


class ProcessesDiffer(ValueError):
    """The processes of one run do not agree; the message says on what, the same on every process."""


def require_same(facts: Mapping[str, str], seconds: float = 3600.0) -> None:
    """Returns if `facts`, by name, are equal on every process. Call on all of them, in the same order.

    Through jax's coordination service, which touches no device: processes that differ may not have the same programs.
    The time is long, as one may open its data more slowly; jax itself tells the others of a process that dies.

    Raises:
      ProcessesDiffer: on all processes. Some fact differs, or a process has called `report_failure` instead, or has not
        come within `seconds`.
    """
    if jax.process_count() > 1:
        _agree({"facts": dict(facts)}, seconds)


def report_failure(message: str) -> None:
    """Tells those that wait, or will wait, in `require_same` that this process does not come, and why."""
    if jax.process_count() > 1:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service may be gone already
            _agree({"failure": message}, None)


def _agree(told: dict[str, Any], seconds: float | None) -> None:
    """Process 0 reads what every process tells, and all read what it finds; for `seconds` None, not to wait for that."""
    # Nothing public reaches the service's table of keys.
    from jax._src.distributed import global_state

    client, name = global_state.client, f"triptych/same/{next(_agreements)}"
    assert client is not None
    client.key_value_set(f"{name}/{jax.process_index()}", json.dumps(told))
    if jax.process_index() == 0:
        found = f"process 0 stopped: {told['failure']}" if "failure" in told else ""
        client.key_value_set(f"{name}/found", found or _compare(client, name, seconds or 0))
    if seconds is None:
        return
    try:
        found = client.blocking_key_value_get(f"{name}/found", round(2000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise ProcessesDiffer(f"process 0 has not answered in {2 * seconds:.0f} s") from error
    if found != _SAME:
        raise ProcessesDiffer(found)


_agreements = itertools.count()  # a key of jax's service serves once
_SAME = "the same"


def _compare(client: Any, name: str, seconds: float) -> str:
    """What differs between the processes, as one line, or `_SAME`."""
    until, facts = time.monotonic() + seconds, []
    for process in range(jax.process_count()):
        left = max(1, round(1000 * (until - time.monotonic())))
        try:
            told = json.loads(client.blocking_key_value_get(f"{name}/{process}", left))
        except jax.errors.JaxRuntimeError:
            return f"process {process} has not come within {seconds:.0f} s to be compared with the others"
        if "failure" in told:
            return f"process {process} stopped: {told['failure']}"
        facts.append(told["facts"])
    return differences(facts) or _SAME


def differences(facts: Sequence[Mapping[str, str]], most: int = 4) -> str:
    """One line that names what differs between processes, `facts[i]` being those of process i; "" if nothing does."""
    names = [
        n for n in dict.fromkeys(itertools.chain(*facts)) if len({f.get(n) for f in facts}) > 1
    ]
    if not names:
        return ""
    shown = []
    for name in names[:most]:
        where: dict[str, list[str]] = {}
        for process, known in enumerate(facts):
            where.setdefault(known.get(name, "(absent)"), []).append(str(process))
        values = [_where(value, on, most) for value, on in itertools.islice(where.items(), most)]
        shown.append(f"{name} is {', '.join(values)}")
    more = f"; and {len(names) - most} more" if len(names) > most else ""
    return f"the processes of this run differ: {'; '.join(shown)}{more}"


def _where(value: str, processes: list[str], most: int) -> str:
    value = value if len(value) <= 120 else f"{value[:120]}..."
    some = ", ".join(processes[:most]) + (" ..." if len(processes) > most else "")
    return f"{value} on process{'es' if len(processes) > 1 else ''} {some}"


class PreemptionGuard:
    """Notices SIGTERM, and SIGUSR1 for SLURM's `--signal=USR1@120`, and lets the loop stop cleanly.

        with PreemptionGuard() as guard:
            for step in ...:
                if guard.reached(step):
                    save(...)
                    sys.exit(EXIT_PREEMPTED)

    Another signal, a second later or more, ends the process at once; so does Ctrl-C at any time.
    The handlers in place before are restored on exit. Outside the main thread, where Python can
    set no handlers, the guard only hears what jax's own service hears.
    """

    def __init__(self) -> None:
        self._signalled_at: float | None = None
        self._reached = False
        self._tell_jax: Callable[[int], Any] | None = None
        self._before: dict[int, tuple[Any, int | None]] = {}

    def reached(self, step: int) -> bool:
        """Whether to save and leave now. Call at every step, on every process, with the same steps.

        With `jax.distributed` up the answer turns true on all processes at one and the same step,
        shortly after any of them got a signal; alone, at the first call after it.
        """
        if jax.distributed.is_initialized():
            self._reached |= multihost_utils.reached_preemption_sync_point(step)
        else:
            self._reached |= self._signalled_at is not None
        return self._reached

    def __enter__(self) -> "PreemptionGuard":
        if threading.current_thread() is threading.main_thread():
            _await_jax_handler()
            for signum in (signal.SIGTERM, signal.SIGUSR1):
                # jax's service listens through a C handler, of which Python knows nothing.
                native = _libc_signal(signum, None)
                self._before[signum] = (signal.signal(signum, self._handle), native)
            python_handler, native = self._before[signal.SIGTERM]
            if native not in (None, 1) and not callable(python_handler):  # SIG_DFL, SIG_IGN
                self._tell_jax = ctypes.CFUNCTYPE(None, ctypes.c_int)(native)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, (python_handler, native) in self._before.items():
            signal.signal(signum, python_handler)
            _libc_signal(signum, native)
        self._before.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            if self._tell_jax is not None:
                self._tell_jax(signal.SIGTERM)
        elif now - self._signalled_at >= _DUPLICATE_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)


class Signalled(BaseException):
    """SIGTERM or SIGUSR1 came. No Exception, so that nothing takes it for a failure of the work."""


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Makes the signals of `PreemptionGuard` raise Signalled at once, for work that has nothing to save.

    In the main thread of a lone process only. Of several, one that left alone would leave the others waiting for it.
    """
    alone = not jax.distributed.is_initialized()
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Signalled

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _await_jax_handler(seconds: float = 10.0) -> None:
    """Waits until jax's service, if it is up, listens: its own thread would otherwise replace our handlers later."""
    until = time.monotonic() + seconds
    while jax.distributed.is_initialized() and time.monotonic() < until:
        action = ctypes.create_string_buffer(1024)  # struct sigaction begins with the handler
        ctypes.CDLL(None).sigaction(signal.SIGTERM, None, action)
        if ctypes.c_void_p.from_buffer(action).value not in (None, 1):  # SIG_DFL, SIG_IGN
            return
        time.sleep(0.01)


_libc_signal = ctypes.CDLL(None).signal  # sets a handler, returns the one before; NULL is SIG_DFL
_libc_signal.restype = ctypes.c_void_p
_libc_signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
