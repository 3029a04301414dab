"""Every job that a config can name exists, and finding one loads no other paper."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from common.config import ConfigError
from common.results import read_rows
from experiments.jepa import baselines as jepa_baselines
from experiments.jepa.configs.cifar10 import get_config
from experiments.jobs import JOBS, SEVERAL_PROCESSES, check_processes, find
from experiments.shared.facts import run_facts, source_digests
from experiments.shared.run import Run


@pytest.mark.parametrize("name", JOBS)
def test_every_job_is_a_function(name):
    assert callable(find(name))


def test_an_unknown_job_names_those_there_are():
    with pytest.raises(ConfigError, match=r"config\.job='jepa_pretrian' is unknown.*sinks_speed"):
        find("jepa_pretrian")


def test_jobs_say_whether_several_processes_can_run_them():
    assert set(JOBS) >= SEVERAL_PROCESSES
    for name in JOBS:
        check_processes(name, 1)
        if name in SEVERAL_PROCESSES:
            check_processes(name, 64)
        else:
            with pytest.raises(ConfigError, match=f"'{name}' runs as one process, but .* has 2"):
                check_processes(name, 2)


def test_what_decides_a_run_is_known_by_name(tmp_path, monkeypatch):
    values = get_config("smoke").to_dict()
    facts = run_facts(values)
    assert facts["config.optim.lr"] == repr(values["optim"]["lr"])
    assert {"config.train.seed", "jax's version", "python", "jax_enable_x64"} <= facts.keys()
    assert "the code common/train_loop.py" in facts
    assert not any("configs" in name for name in facts)  # their values are there

    for folder in ("common", "experiments/jepa/configs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("x = 1")
    before = source_digests(tmp_path)
    assert list(before) == ["the code common/a.py"]
    (tmp_path / "common" / "a.py").write_text("x = 2")
    assert source_digests(tmp_path) != before


@pytest.mark.slow
def test_baselines_leave_a_row_each_and_are_not_done_again(tmp_path, monkeypatch):
    probed, real = [], jepa_baselines.linear_probes

    def probes(settings, mesh, encode, source, test_source, what):
        probed.append(what)
        if what == "raw pixels":
            return real(settings, mesh, encode, source, test_source, what)
        # The encoder's heads take as long to compile as the pixels': its features alone.
        images = np.stack([test_source[i]["image"] for i in range(8)]).repeat(4, 1).repeat(4, 2)
        with jax.set_mesh(mesh):
            features = encode(images)[0]
        return {"linear_label": float(np.std(features))}

    monkeypatch.setattr(jepa_baselines, "linear_probes", probes)
    values = get_config("smoke").to_dict()
    for _ in range(2):
        assert find("jepa_baselines")(Run(values, tmp_path)) == 0
    rows = read_rows(tmp_path / "results.jsonl")
    assert [row.job for row in rows] == ["baseline_untrained", "baseline_pixels"]
    assert probed == ["untrained encoder", "raw pixels"]  # the second call found their rows
    assert all(row.metrics["linear_label"] > 0 for row in rows)
    for resume in ("same", "changed"):
        other = values | {"train": values["train"] | {"seed": 1}}
        with pytest.raises(ConfigError, match=r"config\.train\.seed: saved 0, now 1"):
            find("jepa_baselines")(Run(other, tmp_path, resume=resume))
    pixels = rows[1].metrics
    assert pixels["linear_label/last"] == pixels["linear_label/last4"] > 0.3  # digits, 10 classes


@pytest.mark.slow
def test_a_run_loads_its_own_paper_only():
    code = (
        "import sys; from experiments.jobs import find; find('jepa_pretrain'); "
        "print([m for m in ('sinks.stream', 'tokenizers', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stderr
