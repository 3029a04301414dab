"""Compiles a config's real train step for a TPU pod, or for nodes with NVIDIA GPUs, without them.

  python -m experiments.preflight --config=experiments/jepa/configs/in1k_vith14.py --topology=v5e:16x16
  python -m experiments.preflight --config=experiments/jepa/configs/in1k_vith14.py --topology=h100:8
  python -m experiments.preflight --all --topology=v5e:16x16       # the four released recipes; writes the table
  python -m experiments.preflight --all --missing                  # the same, without those that the table has

Prints per-chip memory against the chip's HBM, FLOPs, the collectives by kind with their bytes, the custom calls (such as
cuDNN's attention), and whether it fits. The sharding rules stand or fall here. Needs the `preflight` extra (libtpu and
JAX's CUDA plugin compile on any x86 machine); takes minutes a recipe. For GPUs, products are compiled without autotuning.
Exit codes: 0 fits, 1 does not fit or does not compile, 2 a setting is wrong.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from experiments.shared.old_paths import renewed
from experiments.shared.old_settings import as_before
from experiments.shared.topologies import COMPILER_OPTIONS, HBM_GIB, KINDS, compiler, topology_chips

# This process compiles for other chips and runs nothing: the CPU is its only device, and no cloud is asked about a TPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# It drives no chip, so a training run at the same time may hold libtpu's lock.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

RELEASED = ("in1k_vith14", "in1k_vith16_448", "in22k_vith14", "in22k_vitg16")
TABLE = Path(__file__).parent / "results" / "jepa" / "preflight.json"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled step needs on each chip.

    Attributes:
      state_gib: parameters, moments, EMA target and batch.  temp_gib: activations and buffers at their peak.
      flops: of the whole step, all chips, matrix products only.
      collectives: kind -> (count, GiB moved through one chip), loops counted in full.
      seconds_at_peak: FLOPs over the pod's bf16 peak: the least time a step can take.
      custom_calls: target -> count, loops counted in full; Triton's fusions are among them.
      config_hash: the whole config's. compiler: the installed ones and their versions. Both are "" in older rows.
    """

    config: str
    topology: str
    chips: int
    mesh: dict[str, int]
    batch: int
    state_gib: float
    temp_gib: float
    hbm_gib: float
    flops: float
    seconds_at_peak: float
    collectives: dict[str, tuple[int, float]]
    compile_seconds: float
    custom_calls: dict[str, int] = dataclasses.field(default_factory=dict)
    config_hash: str = ""
    compiler: str = ""

    @property
    def fits(self) -> bool:
        return self.state_gib + self.temp_gib <= self.hbm_gib


def check(config: dict[str, Any], topology: str) -> Report:
    """Compiles the train step of a "jepa_pretrain" config for a topology such as "v5e:16x16" or "h100:8".

    Raises:
      ConfigError: a setting, the topology or the mesh is wrong, or the `preflight` extra is missing.
    """
    import jax
    import jax.numpy as jnp

    from common.config import ConfigError
    from common.flops import PEAK_FLOPS, traced_flops
    from common.mesh import make_mesh
    from common.results import config_hash
    from common.sharding import batch_sharding, replicated
    from common.state import abstract_with_shardings, state_shardings
    from common.train_step import make_train_step
    from experiments.jepa.settings import resolve

    chip, devices = topology_chips(topology)
    settings = resolve(config)
    try:
        mesh = make_mesh(settings.mesh, devices)
        recipe = settings.on(mesh).recipe
        abstract, sharding = state_shardings(recipe, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    state = abstract_with_shardings(abstract, sharding)
    shapes = recipe.batch_shapes(settings.train.batch)
    batch = abstract_with_shardings(shapes, jax.tree.map(lambda _: batch_sharding(mesh), shapes))
    step = make_train_step(recipe, settings.train.accumulate)
    expected = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(step, out_shardings=(sharding, replicated(mesh)), donate_argnums=0)
            .lower(state, batch, expected)
            .compile(COMPILER_OPTIONS.get(chip))
        )
        flops = traced_flops(step, state, batch, expected)
    seconds = time.perf_counter() - began
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and hlo is not None  # these compilers give both
    counts = count_calls(hlo)
    return Report(
        config=settings.name,
        topology=topology,
        chips=len(devices),
        mesh=dict(mesh.shape),
        batch=settings.train.batch,
        state_gib=memory.argument_size_in_bytes / 2**30,
        temp_gib=(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**30,
        hbm_gib=HBM_GIB[chip],
        flops=flops,
        seconds_at_peak=flops / (PEAK_FLOPS[KINDS[chip]] * len(devices)),
        collectives={kind: n for kind, n in counts.items() if kind in COLLECTIVES},
        compile_seconds=seconds,
        custom_calls={name: n for name, (n, _) in counts.items() if name not in COLLECTIVES},
        config_hash=config_hash(as_before(config)),
        compiler=compiler(chip),
    )  # fmt: skip


def count_calls(hlo: str) -> dict[str, tuple[int, float]]:
    """What an optimised HLO module calls: kind -> (count, GiB of results), loop bodies times their trip counts.

    Kinds are those of collectives, the targets of custom calls, and Triton's kinds of fusions; the last two with 0 GiB.

    The TPU compiler splits an asynchronous collective over several fusions, all with its channel: a channel counts once.
    """
    found: dict[str, list[tuple[str, str, float]]] = {}  # computation -> [(kind, channel, bytes)]
    calls: dict[
        str, list[tuple[str, str, int]]
    ] = {}  # computation -> [(called, condition of the loop or "", its trip count if known)]
    bounds: dict[str, int] = defaultdict(lambda: 1)  # computation -> largest integer constant in it
    entry, name = "", ""
    for line in hlo.splitlines():
        if header := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            found[name], calls[name] = [], []
            continue
        if collective := re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line):
            channel = re.search(r"channel_id=(\d+)", line)
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else collective[2]
            size = _result_bytes(collective[1], start=bool(collective[3]))
            found[name].append((kind, channel[1] if channel else line, size))
        elif call := re.search(r'custom_call_target="([^"]+)"|"kind":"(__triton\w*)"', line):
            found[name].append((call[1] or call[2], line, 0.0))
        if constant := re.search(r"s32\[\][^=]* constant\((\d+)\)", line):
            bounds[name] = max(bounds[name], int(constant[1]))
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        for kind, called in re.findall(
            r"(body|to_apply|calls|called_computation)=%?([\w.\-]+)", line
        ):
            looped = condition[1] if condition and kind == "body" else ""
            calls[name].append((called, looped, int(turns[1]) if turns else 0))
    runs: dict[tuple[str, str], tuple[int, float]] = {}  # (kind, channel) -> (times, bytes each)

    def visit(computation: str, times: int) -> None:
        for kind, channel, size in found.get(computation, []):
            runs[kind, channel] = max(runs.get((kind, channel), (0, 0.0)), (times, size))
        for called, condition, turns in calls.get(computation, []):
            visit(called, times * (turns or bounds[condition]) if condition else times)

    visit(entry, 1)
    total: dict[str, tuple[int, float]] = {}
    for (kind, _), (times, size) in sorted(runs.items()):
        count, gib = total.get(kind, (0, 0.0))
        total[kind] = (count + times, gib + times * size / 2**30)
    return total


def _result_bytes(shapes: str, start: bool) -> float:
    """Bytes of an instruction's results. An asynchronous start also lists its operands: the larger half is the result."""
    # Operands and results of several arrays are tuples.
    groups = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shapes).split(")")
    sizes = [[_bytes(*array) for array in re.findall(r"(\w+)\[([\d,]*)\]", g)] for g in groups]
    halves = [sum(half) for half in sizes] if shapes.startswith("((") else sizes[0]
    return max(halves, default=0.0) if start else sum(sum(half) for half in sizes)


def _bytes(kind: str, dims: str) -> float:
    return BYTES.get(kind, 4) * math.prod(int(dim) for dim in filter(None, dims.split(",")))


def describe(r: Report) -> str:
    """The report as a few lines of text."""
    lines = [
        f"{r.config} on {r.topology} ({r.chips} chips, mesh {r.mesh}), global batch {r.batch}",
        f"  state and batch  {r.state_gib:8.2f} GiB per chip",
        f"  temporaries      {r.temp_gib:8.2f} GiB per chip",
        f"  HBM              {r.hbm_gib:8.2f} GiB per chip -> {'FITS' if r.fits else 'DOES NOT FIT'}",
        f"  matmul FLOPs     {r.flops:8.3g} per step; {r.seconds_at_peak * 1e3:.1f} ms at the pod's bf16 peak",
    ]
    lines += [
        f"  {kind:16s} {count:5d} per step, {size:8.2f} GiB through a chip"
        for kind, (count, size) in r.collectives.items()
    ]
    if r.custom_calls:
        lines.append(
            "  custom calls     " + ", ".join(f"{n} {k}" for k, n in r.custom_calls.items())
        )
    return "\n".join([*lines, f"  compiled in {r.compile_seconds:.0f} s"])


def write_table(table: list[dict[str, Any]], report: Report) -> list[dict[str, Any]]:
    """The committed table with this report instead of an older one, written at once: a compilation takes minutes."""
    key = (report.config, report.topology)
    rest = [row for row in table if (row["config"], row["topology"]) != key]
    table = sorted(
        [*rest, dataclasses.asdict(report)],
        key=lambda row: (row["topology"], RELEASED.index(row["config"])),
    )
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {TABLE}", flush=True)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.preflight",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--config", help="PATH.py or PATH.py:argument")
    parser.add_argument(
        "--all", action="store_true", help="the four released recipes; writes the committed table"
    )
    parser.add_argument(
        "--topology",
        default="v5e:16x16",
        help="chip:grid, e.g. v5e:16x16, v4:4x4x8, v6e:16x16; or GPUs, nodes by GPUs: h100:8, h100:4x8",
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="with --all: skip what the table has for this topology, of the recipe as it is now",
    )
    args = parser.parse_args(renewed(sys.argv[1:] if argv is None else argv))
    if bool(args.config) == args.all:
        parser.error("give either --config or --all")
    from common.results import config_hash
    from experiments.jobs import explain

    here = Path(__file__).parent / "jepa" / "configs"
    table = json.loads(TABLE.read_text()) if args.all and TABLE.exists() else []
    known = {(row["topology"], row.get("config_hash", "")) for row in table}
    paths = [here / f"{name}.py" for name in RELEASED] if args.all else [args.config]
    if args.missing:
        paths = [
            p for p in paths if (args.topology, config_hash(as_before(_load(str(p))))) not in known
        ]

    fit = True
    for path in paths:
        print(f"compiling {path} for {args.topology} ...", file=sys.stderr, flush=True)
        try:
            report = _compiled(str(path), args.topology)
        except Exception as error:
            if (told := explain(error)) is None:
                raise
            print(f"error: {told[0]}", file=sys.stderr)
            return told[1]
        fit = fit and report is not None and report.fits
        if report is not None:
            print(describe(report), flush=True)
            if args.all:
                table = write_table(table, report)
    return 0 if fit else 1


def _compiled(path: str, topology: str) -> Report | None:
    """The report of a config's step; None, and a line that says why, where the compiler finds no room or no program."""
    import jax

    from common.config import ConfigError
    from experiments.jobs import out_of_memory

    values = _load(path)
    if (job := values.get("job")) != "jepa_pretrain":
        raise ConfigError(
            f"--config={path}: preflight compiles the train step of job jepa_pretrain, and this config's job is {job}"
        )
    try:
        return check(values, topology)
    except jax.errors.JaxRuntimeError as error:
        verdict = "DOES NOT FIT" if out_of_memory(error) else "DOES NOT COMPILE"
        print(f"{path} on {topology}: {verdict}: {str(error).strip().splitlines()[0]}", flush=True)
        return None


def _load(path_and_arg: str) -> dict[str, Any]:
    """The settings that a config file's get_config returns."""
    from common.config import ConfigError

    path, _, arg = path_and_arg.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"--config={path}: no such file")
    spec = importlib.util.spec_from_file_location("config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(
            f"--config={path}: {error.filename}, line {error.lineno}: {error.msg}"
        ) from error
    return module.get_config(arg).to_dict()


if __name__ == "__main__":
    sys.exit(main())
