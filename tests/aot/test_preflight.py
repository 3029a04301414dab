"""Preflight: what it reads from a compiled program, and a real compile for a TPU topology where libtpu is installed."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import pytest

from common.results import config_hash
from experiments import preflight
from experiments.shared.old_settings import as_before

HLO = """
%all-reduce-scatter.1 (a: f32[8,4]) -> f32[2,4] {
  %all-reduce.9 = f32[8,4]{1,0} all-reduce(%a), channel_id=7, to_apply=%add
}
%part.1 (a: bf16[4]) -> bf16[8] {
  %all-gather.1 = bf16[8]{0} all-gather(%a), channel_id=3, dimensions={0}
}
%part.2 (a: bf16[4]) -> bf16[8] {
  %all-gather.2 = bf16[8]{0} all-gather(%a), channel_id=3, dimensions={0}
}
%condition.1 (p: (s32[])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(12)
}
%body.1 (p: (s32[])) -> (s32[]) {
  %fusion.1 = bf16[8]{0} fusion(%p), kind=kCustom, calls=%part.1
  %fusion.2 = bf16[8]{0} fusion(%p), kind=kCustom, calls=%part.2
}
ENTRY %main (p: f32[8,4]) -> f32[2,4] {
  %while.1 = (s32[]) while(%p), condition=%condition.1, body=%body.1
  %ar = (f32[4]{0}, f32[4]{0}) all-reduce-start(%p), channel_id=1, to_apply=%add
  %fusion.3 = f32[2,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_count_loops_in_full_and_channels_once():
    gib = 2**30
    assert preflight.count_calls(HLO) == {
        "all-gather": (12, 12 * 16 / gib),
        "all-reduce": (1, 16 / gib),
        "reduce-scatter": (1, 128 / gib),
    }


# On GPUs the loop's end lies in a fusion, and an asynchronous collective takes several arrays.
GPU_HLO = """
%body.1 (p: (s32[])) -> (s32[]) {
  %ag.1 = ((bf16[4,2]{1,0}, bf16[8]{0}), (bf16[8,2]{1,0}, /*index=3*/bf16[16]{0})) all-gather-start(%a, %b), channel_id=3
  %attention.1 = (bf16[8]{0}, u8[0]{0}) custom-call(%p, %p, %p), custom_call_target="__cudnn$fmhaSoftmax"
  %gemm.1 = f32[8]{0} fusion(%p), calls=%gemm, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
}
%condition.1 (p: (s32[])) -> pred[] {
  %wrapped_compare = pred[] fusion(%p), kind=kLoop, calls=%compare
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[]) while(%p), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"12"}}
}
"""


def test_what_a_gpu_is_called_with_counts_loops_in_full():
    assert preflight.count_calls(GPU_HLO) == {
        "all-gather": (12, 12 * 64 / 2**30),
        "__cudnn$fmhaSoftmax": (12, 0),
        "__triton_gemm": (12, 0),
    }


@pytest.mark.parametrize(
    ("config", "topology", "message"),
    [
        ("nowhere.py", "v5e:2x4", "nowhere.py: no such file"),
        (
            "experiments/jepa/configs/scenes.py:smok",
            "v5e:2x4",
            "did you mean config argument smoke",
        ),
        ("experiments/jepa/configs/scenes.py:smoke", "v9:2x4", "chip 'v9' is unknown"),
        ("experiments/jepa/configs/scenes.py:smoke", "h100:2y8", "such as h100:8|pip install"),
    ],
)
def test_wrong_input_is_one_plain_line(config, topology, message, capsys):
    assert preflight.main([f"--config={config}", f"--topology={topology}"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ")

    assert re.search(message, err)


RELEASED = "experiments/jepa/configs/in1k_vith14.py"
TOO_BIG = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in hbm. Used 30G of 16G.\nMore"
NO_MESH = "Failed to find assignment for logical_axis_index 1 of size 16 with remaining assignable mesh [8, 8, 0]"


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (jax.errors.JaxRuntimeError(TOO_BIG), 1, "DOES NOT FIT: RESOURCE_EXHAUSTED"),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Mosaic\nMore"),
            1,
            "DOES NOT COMPILE: INTERNAL: Mosaic",
        ),
        (NotImplementedError(NO_MESH), 2, "choose other sizes of config.mesh"),
    ],
    ids=["too big", "no program", "no mesh"],
)
def test_a_program_that_the_compiler_refuses_is_a_plain_line(
    monkeypatch, capsys, raised, code, said
):
    def check(values, topology):
        raise raised

    monkeypatch.setattr(preflight, "check", check)
    assert preflight.main([f"--config={RELEASED}", "--topology=v5e:2x2"]) == code
    out, err = capsys.readouterr()
    assert said in out + err and "More" not in out + err
    assert (out + err).count("\n") == 2  # what is compiled, and how it ends


def test_one_that_does_not_fit_leaves_the_others_their_turn(monkeypatch, capsys, tmp_path):
    row = json.loads(preflight.TABLE.read_text())[0]

    def check(values, topology):
        if values["name"] == "in1k_vith14":
            raise jax.errors.JaxRuntimeError(TOO_BIG)
        return preflight.Report(**{**row, "config": values["name"], "collectives": {}})

    monkeypatch.setattr(preflight, "check", check)
    monkeypatch.setattr(preflight, "TABLE", tmp_path / "table.json")
    assert preflight.main(["--all"]) == 1
    assert {r["config"] for r in json.loads(preflight.TABLE.read_text())} == {
        *preflight.RELEASED
    } - {"in1k_vith14"}
    assert capsys.readouterr().out.count("FITS") == 3


def test_missing_is_what_the_table_lacks_of_the_recipe_as_it_is_now(monkeypatch, tmp_path):
    row, seen = json.loads(preflight.TABLE.read_text())[0], []

    def check(values, topology):
        seen.append(values["name"])
        found = {**row, "config": values["name"], "collectives": {}}
        return preflight.Report(**found | {"config_hash": config_hash(as_before(values))})

    monkeypatch.setattr(preflight, "check", check)
    monkeypatch.setattr(preflight, "TABLE", tmp_path / "table.json")
    assert preflight.main(["--all"]) == preflight.main(["--all", "--missing"]) == 0
    assert seen == [*preflight.RELEASED]
    table = json.loads(preflight.TABLE.read_text())
    table[0]["config_hash"] = "of another rate"
    preflight.TABLE.write_text(json.dumps(table))
    assert preflight.main(["--all", "--missing"]) == 0
    assert seen == [*preflight.RELEASED, table[0]["config"]]


def test_another_job_is_refused_by_name(capsys):
    assert preflight.main(["--config=experiments/sinks/configs/pretrain.py"]) == 2
    assert "this config's job is sinks_pretrain" in capsys.readouterr().err


def test_the_committed_table_holds_the_released_recipes():
    rows = json.loads(preflight.TABLE.read_text())
    assert {row["config"] for row in rows} <= set(preflight.RELEASED)
    for row in rows:
        assert row["state_gib"] + row["temp_gib"] <= row["hbm_gib"]
        assert (row["batch"], row["chips"]) == (2048, 256)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the preflight extra"
)


def python(*arguments):
    """What a process of its own prints: libtpu changes how jax starts, and knows no flags of tests/conftest.py."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "says"),
    [("v5e:2x4", ("8 chips", "all-gather")), ("v5e:1x1", ("1 chips",)), ("v4:2x2x1", ("4 chips", "32.00"))],
)  # fmt: skip
def test_compiles_for_chips_without_one(topology, says):
    config = "experiments/jepa/configs/in1k_vith14.py:smoke"
    printed = python("-m", "experiments.preflight", f"--config={config}", f"--topology={topology}")
    assert all(words in printed for words in (*says, "FITS"))


MESHES = """
import sys
from experiments.preflight import topology_chips  # which sets up jax
from common.mesh import MeshSpec, make_mesh
for topology, chips in {"v4:4x4x8": 128, "v5e:16x16": 256, "v5p:4x4x4": 64, "v6e:8x8": 64}.items():
    kind, devices = topology_chips(topology)
    assert (kind, len(devices)) == (topology.partition(":")[0], chips), (topology, len(devices))
    for spec in (MeshSpec(), MeshSpec(2), MeshSpec(4), MeshSpec(8), MeshSpec(tensor=8), MeshSpec(4, -1, 2)):
        assert make_mesh(spec, devices).size == chips
"""


@pytest.mark.aot
@needs_libtpu
def test_every_kind_of_pod_takes_the_released_meshes():
    python("-c", MESHES)
