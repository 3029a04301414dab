"""The GPU benches on a CPU, at tiny sizes: every cell gives a row, once, and nothing is begun that time does not allow."""

import importlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from common.results import read_rows
from experiments.shared import bench_gpu
from experiments.shared.bench_gpu import Cell, Contender

PAPERS = ("jepa", "sinks", "metaopt")
PEERS = ("torch", "hf", "gdtuo")


def module(paper):
    return importlib.import_module(f"experiments.{paper}.bench_gpu")


def run(cells, out, *flags):
    assert bench_gpu.run_part("bench_gpu_test", cells, ["--smoke", f"--out={out}", *flags]) == 0
    return read_rows(out)


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_every_cell_gives_a_row_and_none_twice(paper, tmp_path):
    cells = module(paper).cells
    rows = run(cells, out := tmp_path / "rows.jsonl")
    assert [r.arg for r in rows] == [
        "ceilings start",
        *(c.name for c in cells(True)),
        "ceilings end",
    ]
    for row, cell in zip(rows[1:-1], cells(True)):
        missing = row.overrides["failed"]
        assert all(k.startswith(PEERS) and "ModuleNotFound" in why for k, why in missing.items())
        for name in cell.contenders.keys() - missing.keys():
            assert row.metrics[f"{name}_ms_low"] <= row.metrics[f"{name}_ms"]
            assert row.metrics[f"{name}_per_second"] > 0
    assert [r.id for r in run(cells, out)] == [r.id for r in rows]


@pytest.mark.peers
@pytest.mark.filterwarnings(
    "ignore:Using backward:UserWarning", "ignore:.*past_key_values:FutureWarning"
)
@pytest.mark.parametrize("paper", PAPERS)
def test_every_peer_runs(paper):
    for cell in module(paper).cells(True):
        for name, make in cell.contenders.items():
            if name.startswith(PEERS):
                make().run()


@pytest.mark.parametrize("paper", PAPERS)
def test_the_cells_of_a_gpu_are_named_once_and_each_fits_a_part(paper):
    cells = module(paper).cells(False)
    assert len({c.name for c in cells}) == len(cells)
    assert all(c.estimate < 8 * 60 - 2 * 20 for c in cells)


def sleeping(name, estimate, wrong=None):
    def make():
        if wrong:
            raise wrong
        return Contender(lambda: None, steps=2, items=3)

    return Cell(name, estimate, {"ours": make})


@pytest.mark.slow
def test_what_fails_or_has_no_time_left_is_said_and_tried_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_gpu, "ceilings", lambda smoke: sleeping("ceilings", 1))
    broken = sleeping("broken", 1, ValueError("no such kernel"))
    cells = [sleeping("long", 300), sleeping("short", 1), broken]
    out = tmp_path / "rows.jsonl"
    names = [r.arg for r in run(lambda smoke: cells, out, "--minutes=2")]
    assert names == ["ceilings start", "short", "ceilings end"]
    said = capsys.readouterr().out
    assert (
        "long: left out, 300 s and" in said and "broken: ours failed: ValueError: no such" in said
    )
    cells[2] = sleeping("broken", 1)
    names = [r.arg for r in run(lambda smoke: cells, out, "--minutes=9")]
    assert names[3:] == ["ceilings start", "long", "broken", "ceilings end"]


def test_numbers_that_differ_from_the_cpus_are_no_contender():
    x = jnp.arange(1.0, 5.0)
    assert bench_gpu.checked(jnp.sin, jnp.sin, 1e-5, x).facts["error"] < 1e-5
    with pytest.raises(ValueError, match="against the CPU's numbers, above 1e-05"):
        bench_gpu.checked(lambda x: jnp.sin(x * 1.001), jnp.sin, 1e-5, x)


def test_memory_that_does_not_suffice_halves_the_batch():
    def make(batch):
        if batch > 16:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return Contender(lambda: None)

    assert bench_gpu.largest(make, 64).facts == {"batch": 16.0}


def test_a_gpu_is_asked_for_where_there_is_none(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_gpu.run_part("bench_gpu_test", lambda smoke: [], [f"--out={tmp_path / 'x'}"])
    assert "there is no GPU here: give --smoke" in capsys.readouterr().err


@pytest.mark.slow
def test_nothing_that_a_gpu_machine_may_lack_is_imported():
    code = "import sys, " + ", ".join(f"experiments.{p}.bench_gpu" for p in PAPERS)
    code += (
        "; print({'grain', 'ml_collections', 'tensorflow_datasets', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
