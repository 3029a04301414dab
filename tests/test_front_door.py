"""The README is short, its snippets run as printed, its table follows from the rows, and the examples run."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import sinks
from sinks import loading
from tests.sinks.checkpoints import byte_level_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SMALL = {  # settings with which an example runs in seconds
    "learned_rate": {"RATES": (1e-7,), "STEPS": 120},
    "ijepa_digits": {"STEPS": 2, "BATCH": 8, "SIZES": {"width": 16, "depth": 1, "heads": 2, "hidden": 32}},
    "endless_text": {"TOKENS": 100, "CACHE": 32, "CHUNK": 32, "NEW_TOKENS": 4},
    "train_on_a_mesh": {"STEPS": 2},
}  # fmt: skip


@pytest.fixture
def tiny_model(tmp_path, monkeypatch):
    """`sinks.load` of any name gives a small model with random weights."""
    folder = byte_level_folder(tmp_path / "model")
    monkeypatch.setattr(sinks, "load", lambda name: loading.load(folder, check=False))


def run_snippet(first_import: str) -> dict:
    """What the one snippet with this import leaves behind; it brings all imports along."""
    [snippet] = [s for s in SNIPPETS if f"import {first_import}\n" in s]
    space: dict = {}
    exec(compile(snippet, "README.md", "exec"), space)
    return space


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for setting, value in SMALL[name].items():
        assert hasattr(module, setting)
        setattr(module, setting, value)
    return module


def test_the_first_screen_has_all_that_a_newcomer_needs():
    lines = README.splitlines()
    first = "\n".join(lines[:40])
    assert len(lines) <= 90
    assert re.search(r"^!\[.*\]\(.*\.png\)$", first, re.MULTILINE)
    assert "\nmake reproduce " in first and "\nmake test " in first
    assert SNIPPETS[0] in first


def test_snippets_are_short_and_every_paper_has_one():
    assert len(SNIPPETS) == 3
    assert all(len(snippet.splitlines()) <= 10 for snippet in SNIPPETS)
    for package in ("metaopt", "sinks", "jepa"):
        assert sum(bool(re.search(rf"^(import|from) {package}\b", s, re.M)) for s in SNIPPETS) == 1


@pytest.mark.slow
def test_the_snippet_of_metaopt_makes_optimizers():
    space = run_snippet("metaopt")
    params = {"w": np.ones(3, np.float32)}
    for name in ("optimizer", "tower"):
        tx = space[name]
        updates, state = tx.update(params, tx.init(params), params)
        assert np.all(np.asarray(updates["w"]) < 0)
        assert optax.tree.get_all_with_path(state, "learning_rate")


@pytest.mark.slow
def test_the_snippet_of_sinks_reads_and_writes(tiny_model, capsys):
    space = run_snippet("sinks")
    assert space["logits"].shape == (1, space["config"].vocab_size)
    assert capsys.readouterr().out


@pytest.mark.slow
def test_the_snippet_of_jepa_trains_a_step():
    space = run_snippet("jax")
    assert int(space["after"].step) == 1
    assert np.isfinite(space["metrics"]["loss"].sum)


def test_the_table_is_short_and_its_ratios_follow_from_its_numbers():
    rows = [line for line in README.splitlines() if re.match(r"\| (metaopt|sinks|jepa):", line)]
    assert 3 <= len(rows) <= 7
    for row in rows:
        _, ours, rival, ratio = [cell.strip() for cell in row.strip("|").split("|")]
        ours, rival, ratio = (float(re.search(r"\d+(\.\d+)?", c).group()) for c in (ours, rival, ratio))  # fmt: skip
        assert ratio == pytest.approx(ours / rival, abs=0.006, rel=0.004), row


def results(path: str) -> list[dict]:
    lines = (ROOT / "experiments" / "results" / path).read_text().splitlines()
    return [json.loads(line) for line in lines]


def worst(path: str, method: str, metric: str) -> float:
    runs = [r for r in results(path) if r["overrides"]["method"] == method]
    assert len(runs) == 9
    return max(float(r["metrics"][metric]) for r in runs)


def test_the_table_is_what_the_rows_say():
    [decode] = [r["metrics"] for r in results("sinks/bench_decode.jsonl") if "fbd2b948" in r["id"]]
    [step] = [r["metrics"] for r in results("jepa/bench_step.jsonl") if "095dcc87" in r["id"]]
    [quick] = [r["metrics"] for r in results("sinks/quick.jsonl")]
    probes = [
        r["metrics"]["linear_label/last4"]
        for r in results("jepa/cifar10.jsonl")
        if r["job"] == "jepa_pretrain"
    ]
    mnist, charrnn = "metaopt/robustness_mnist.jsonl", "metaopt/robustness_charrnn_full.jsonl"
    said = [
        f"{100 * worst(mnist, 'auto(adam)', 'error'):.2f} % | "
        f"Mechanic {100 * worst(mnist, 'mechanic(adam)', 'error'):.2f} %",
        f"{worst(charrnn, 'auto(adam)', 'perplexity'):.2f} | "
        f"Mechanic {worst(charrnn, 'mechanic(adam)', 'perplexity'):.2f}",
        f"{quick['perplexity/sinks 4+252']:.1f} | re-computation {quick['perplexity/recompute']:.1f} "
        f"(window {quick['perplexity/window 0+256']:.1f})",
        f"{decode['tokens_per_second_chunk_bfloat16']:.0f} | transformers {decode['tokens_per_second_hf_float32']:.1f} | "
        f"{decode['ratio_chunk_bfloat16']:.1f}",
        f"{decode['tokens_per_second_decode_float32']:.1f} ({decode['tokens_per_second_decode_int8']:.1f}) | "
        f"transformers {decode['tokens_per_second_hf_float32']:.1f} | {decode['ratio_decode_float32']:.2f} "
        f"({decode['ratio_decode_int8']:.2f})",
        f"{step['images_per_second_ours']:.0f} | torch.compile {step['images_per_second_torch_bf16_compiled']:.0f} | "
        f"{step['ratio_ours']:.2f}",
        f"{100 * np.mean(probes):.1f} %",
    ]
    assert [line for line in said if f"| {line}" not in README] == []


def test_every_example_is_short_and_imports_only_libraries():
    assert {path.stem for path in EXAMPLES} == set(SMALL)
    for path in EXAMPLES:
        text = path.read_text()
        assert len(text.splitlines()) < 60, path.name
        for node in ast.walk(ast.parse(text)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [n for n in names if n.split(".")[0] in ("experiments", "tests")], path.name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL.keys() - {"train_on_a_mesh"}))
def test_example_runs(name, tiny_model, capsys):
    load_example(name).main()
    said = capsys.readouterr().out
    if name == "learned_rate":
        fixed, learned = (float(x) for x in re.findall(r"([\d.]+) %", said))
        assert learned < fixed / 2  # a fixed rate of 1e-7 learns nothing
    if name == "ijepa_digits":
        assert re.search(
            r"untrained: .*\nstep 2, loss \d\.\d+: \d+\.\d % of test images right\n", said
        )
    if name == "endless_text":
        assert re.search(r"window 0\+32:( \d+){4}\nsinks  4\+28:( \d+){4}\n", said)
        assert "read and written: 103 tokens; kept: 32\n" in said


@pytest.mark.slow
def test_the_mesh_example_trains_alike_on_one_device_and_on_eight(monkeypatch, capsys):
    example, losses = load_example("train_on_a_mesh"), {}
    for n in (8, 1):
        monkeypatch.setattr(jax, "devices", lambda *_, n=n: jax.local_devices()[:n])
        example.main()
        said = capsys.readouterr().out
        losses[n] = [float(x) for x in re.findall(r"step \d+: ([\d.]+) nats", said)]
        assert ("'fsdp': 4, 'tensor': 2" if n == 8 else "'fsdp': 1, 'tensor': 1") in said
        assert re.search(r"up +\(2, 64, 256\) +-> P\(None, 'fsdp', 'tensor'\)", said)
    assert len(losses[1]) == 2 and losses[1] == pytest.approx(losses[8], abs=2e-4)
