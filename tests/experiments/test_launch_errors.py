"""What a user can get wrong costs one plain line and exit code 2, before anything is computed."""

import sys

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from common import distributed
from common.state import state_shardings
from common.train_loop import Preempted
from experiments import jobs, launch
from experiments.jepa import pretrain as jepa_pretrain
from experiments.shared import training

CONFIG = "experiments/jepa/configs/scenes.py"
SMOKE = f"--config={CONFIG}:smoke"


class Computed(Exception):
    """Training began."""


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    """Runs the launcher in this process, up to the first step: (exit code, its stderr)."""

    def start(*arguments, train=None, workdir=tmp_path / "run"):
        def begin(*args, **kwargs):
            raise Computed

        argv = ["launch", *arguments, *([f"--workdir={workdir}"] if workdir else [])]
        with monkeypatch.context() as patch, flagsaver.flagsaver():
            patch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
            patch.setattr(training, "train", train or begin)
            code = launch.main(argv)
        return code, capsys.readouterr().err

    return start


@pytest.fixture
def refusal(start):
    """What the launcher refuses a run with: one line, and one for each thing that it lists."""

    def refusal(*arguments, lines=1, **kwargs):
        code, text = start(*arguments, **kwargs)
        assert code == 2, text
        assert text.startswith("error: ") and text.endswith("\n")
        assert text.count("\n") == lines and "Traceback" not in text, text
        return text

    return refusal


def test_a_right_run_gets_through_to_training(start):
    with pytest.raises(Computed):
        start(SMOKE)


def test_a_job_for_one_process_is_refused_by_several(refusal, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for what in ("require_same", "report_failure"):
        monkeypatch.setattr(distributed, what, lambda facts: None)
    monkeypatch.setattr(distributed, "initialize", lambda *given: None)
    line = refusal("--config=experiments/sinks/configs/speed.py")
    assert "config.job='sinks_speed' runs as one process, but this run has 2" in line


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [("optim.lrr", '"lr" instead of "lrr"'), ("optm.lr", '"optim" instead of "optm"')],
)
def test_a_misspelt_setting_is_told_the_nearest(refusal, setting, nearest):
    assert nearest in refusal(SMOKE, f"--config.{setting}=1")


def test_a_setting_like_no_other_is_named(refusal):
    assert "no such setting: 'zzzzz'" in refusal(SMOKE, "--config.optim.zzzzz=1")


def test_a_misspelt_config_argument_is_told_the_nearest(refusal):
    text = refusal(f"--config={CONFIG}:smok")
    assert "smok is not a setting" in text and "smoke?" in text


def test_a_config_argument_of_the_wrong_type_is_refused(refusal):
    assert "'epochs=x': expected float" in refusal(f"--config={CONFIG}:epochs=x")


def test_an_argument_without_dashes_is_not_ignored(refusal):
    assert "config.train.steps=1 is not understood" in refusal(SMOKE, "config.train.steps=1")


def test_a_misspelt_flag_is_told_the_nearest(refusal):
    assert "workdir" in refusal(SMOKE, "--workdri=x")


def test_an_unknown_job_is_told_the_known_ones(refusal):
    text = refusal(SMOKE, "--config.job=jepa_pretrian")
    assert "'jepa_pretrian' is unknown" in text and "known jobs: jepa_pretrain" in text


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        # of the wrong type
        ("optim.lr=abc", ["config.optim.lr=abc", "float"]),
        ("train.steps=2.5", ["config.train.steps=2.5"]),
        ("data.crop_scale=(0.5,)", ["config.data.crop_scale=(0.5,)", "expected 2 values"]),
        # of the wrong size
        ("model.image=33", ["33", "patches of 4", "36"]),
        ("model.heads=3", ["model.width=32", "3 heads"]),
        ("model.size=tyni", ["'tyni'", "tiny"]),
        ("mesh.fsdp=3", ["fsdp=3", "8", "set one axis to -1"]),
        ("mesh.tensor=3", ["tensor=3", "8 devices do not divide by 3"]),
        ("model.width=36", ["encoder/", "36 does not divide by fsdp=8", "config.mesh"]),
        ("train.batch=12", ["train.batch=12", "fsdp=8", "multiple of 8"]),
        ("train.accumulate=2", ["train.batch=8 in 2 microbatches", "multiple of 16"]),
        ("train.accumulate=3", ["train.batch=8", "train.accumulate=3"]),
        ("train.epochs=1", ["config.train.epochs=1.0", "config.train.steps=3", "exactly one"]),
        ("optim.warmup_epochs=9", ["optim.warmup=", "longer than the run of 3", "lower it"]),
        ("checkpoint.keep=0", ["keep=0", "at least 1"]),
        ("train.seed=-1", ["seed", "-1"]),
        ("train.save_every=-1", ["train.save_every=-1"]),
        ("data.crop_scale=(0.5, 0.2)", ["config.data.crop_scale=(0.5, 0.2)", "the smaller first"]),
        ("data.split=trian", ["'trian'", "train"]),
        # of probes and evaluations
        ("probe.knn_train=19", ["knn_train=19", "at least 20", "neighbors=20"]),
        ("probe.knn_test=1", ["knn_test=1", "at least 2"]),
        ("probe.train_examples=1", ["train_examples=1", "at least 2"]),
        ("probe.test_examples=-1", ["test_examples=-1"]),
        ("probe.neighbors=0", ["neighbors=0"]),
        ("probe.neighbors=2000", ["knn_train=32", "neighbors=2000"]),
        ("probe.batch=0", ["config.probe", "batch=0"]),
        ("data.held_out=1.5", ["held_out=1.5", "below 1"]),
        ("data.test_split=train", ["test_split='train'", "--config.probe.test_on_train=true"]),
        # too small for the masks
        ("model.image=12", ["grid (3, 3)", "2 tokens", "min_keep", "raise context_tokens"]),
        ("masks.num_targets=20", ["num_targets=20", "fewer or smaller targets"]),
        ("masks.num_targets=40", ["num_targets=40", "; use fewer or smaller targets"]),
        ("masks.mode=papre", ["'papre'", '"paper"']),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_the_remedy(refusal, setting, words):
    text = refusal(SMOKE, f"--config.{setting}")
    assert [word for word in words if word not in text] == [], text


def test_a_missing_data_set_names_the_command_that_prepares_it(refusal, tmp_path):
    settings = ["--config.data.name=cifar10", f"--config.data.data_dir={tmp_path}"]
    text = refusal(SMOKE, *settings, lines=3)
    assert f"'cifar10' is not in {tmp_path}" in text
    assert f"\n  python -m common.data prepare cifar10 --data_dir={tmp_path}\n" in text


@pytest.fixture
def folder(tmp_path):
    """20 images in each of two splits; in train/ also two files that are none."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(20):
            path = tmp_path / "images" / split / f"{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
    (path.parents[2] / "train" / "0" / "notes.txt").write_text("not an image")
    (path.parents[2] / "train" / "1" / "cut.png").write_bytes(b"")
    return path.parents[2]


def test_files_that_are_no_images_are_counted_and_named(refusal, folder):
    text = refusal(SMOKE, f"--config.data.name=folder:{folder}", lines=4)
    assert "2 of 22 files" in text and "0/notes.txt" in text and "1/cut.png" in text
    assert "skip_bad" in text


def test_files_that_are_no_images_are_skipped_where_asked_for(start, folder):
    settings = [f"--config.data.name=folder:{folder}", "--config.data.skip_bad=true"]
    with pytest.warns(UserWarning, match="skipped: 2 of 22 files"), pytest.raises(Computed):
        start(SMOKE, *settings)


def test_a_missing_folder_is_named(refusal, tmp_path):
    assert f"{tmp_path}/no" in refusal(SMOKE, f"--config.data.name=folder:{tmp_path}/no")


@pytest.mark.slow
def test_another_rate_does_not_continue_a_run_without_a_word(refusal, start, begun):
    before = begun()
    faster = "--config.optim.lr=0.05"
    text = refusal(*RESUMED, faster, lines=3)
    assert "\n  config.optim.lr: saved 0.001, now 0.05\n" in text
    assert "another --workdir" in text and "--resume=changed" in text
    assert begun() == before
    with pytest.raises(Computed):
        start(*RESUMED, faster, "--resume=changed")
    free = ["--config.mesh.fsdp=1", "--config.train.log_every=7", "--config.train.save_every=9"]
    with pytest.raises(Computed):
        start(*RESUMED, *free)


@pytest.mark.slow
def test_a_run_that_is_trained_to_its_end_takes_settings_of_evaluations_alone(
    start, refusal, tmp_path
):
    ran = []

    def train(recipe, spec, *, meta, open_writer, checkpointer, workdir, **kwargs):
        trained = (workdir / "checkpoints").exists() and checkpointer.steps()
        open_writer(spec.steps if trained else -1).close()
        ran.append(kwargs["evaluate_again"])
        checkpointer.save(
            spec.steps, {"a": jax.numpy.zeros(1)}, meta, wait=True
        ) if not trained else None
        raise Preempted("done")

    assert start(*RESUMED, train=train)[0] == 75
    changed = ("--resume=changed", "--config.objective.vicreg=0.1")
    assert "objective.vicreg would change nothing" in refusal(*RESUMED, *changed, train=train)
    assert ran == [False]
    probe = ("--resume=changed", "--config.probe.neighbors=1")
    assert start(*RESUMED, *probe, train=train)[0] == 75 and ran == [False, True]


@pytest.mark.slow
def test_other_test_images_are_refused_by_name(refusal, begun, monkeypatch):
    before = begun()
    monkeypatch.setattr(
        jepa_pretrain, "_measured_on", lambda sets: {"bank": {}, "test": {"length": 59}}
    )

    def resumed(recipe, spec, *, open_writer, **kwargs):
        open_writer(0)

    text = refusal(*RESUMED, train=resumed, lines=4)
    assert "evaluated on other images" in text and "now {'length': 59}" in text
    assert begun() == before


def test_a_batch_larger_than_the_set_is_refused(refusal):
    assert "config.train.batch=5000 is larger than" in refusal(
        SMOKE, "--config.train.batch=5000", "--config.masks.collate=1"
    )


def test_a_run_knows_what_the_command_line_changed(start, monkeypatch):
    runs = []
    monkeypatch.setattr(jobs, "find", lambda name: lambda run: runs.append(run) or 0)
    start(f"{SMOKE},seed=3", "--config.optim.lr=0.5", "--config.data.crop_scale=(0.5, 1.0)")
    (run,) = runs
    assert (run.config, run.arg, run.resume) == (CONFIG, "smoke,seed=3", "same")
    assert run.overrides == {"optim.lr": 0.5, "data.crop_scale": (0.5, 1.0)}


def test_resume_has_two_values(refusal):
    assert "same|changed" in refusal(SMOKE, "--resume=yes")


def test_a_workdir_is_needed(refusal):
    assert "--workdir" in refusal(SMOKE, workdir=None)


def test_a_config_is_needed(refusal):
    assert "--config" in refusal()


@pytest.mark.parametrize("override", [[], ["--config.optim.lr=1"]])
def test_a_config_file_that_is_not_there_is_named(refusal, override):
    text = refusal("--config=experiments/jepa/configs/none.py:smoke", *override)
    assert "'experiments/jepa/configs/none.py'" in text and "No such file" in text


def test_a_config_file_that_is_no_python_is_named_with_the_line(refusal, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text('def get_config(arg=""):\n    return x y\n')
    assert f"{path}, line 2: invalid syntax" in refusal(f"--config={path}")


def test_half_the_flags_of_a_cluster_are_refused(refusal):
    assert "all or none" in refusal(SMOKE, "--num_processes=2")


# Whole arrays on every device: to check a checkpoint then takes no collectives, which are slow here.
RESUMED = (SMOKE, "--config.mesh.replica=8")


@pytest.fixture
def begun(start, tmp_path):
    """A workdir with the checkpoint of a run's first step; returns the record of its config."""

    def fill(leaf, sharding):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), sharding)
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), sharding)

    def save_at_once(recipe, spec, *, mesh, checkpointer, meta, open_writer, **kwargs):
        open_writer(-1).close()
        state = jax.tree.map(fill, *state_shardings(recipe, mesh))
        checkpointer.save(0, state, meta, wait=True)
        raise Preempted("saved")

    code, text = start(*RESUMED, train=save_at_once)
    assert code == 75, text
    return lambda: (tmp_path / "run" / "config.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "differences"),
    [
        ("train.seed=1", ["seed: saved 0, now 1", "transforms: saved"]),  # masks have the seed too
        ("data.crop_scale=(0.5,1.0)", ["scale=(0.5, 1.0)"]),
        (
            "data.split=test --config.data.test_split=train",
            ["split: saved 'train', now 'test'", "length: saved"],
        ),
    ],
)
def test_other_data_cannot_continue_a_run(refusal, begun, setting, differences):
    before = begun()
    arguments = (*RESUMED, *f"--config.{setting}".split(" "), "--resume=changed")
    text = refusal(*arguments, train=training.train, lines=2 + len(differences))
    assert "trained on other data" in text and "Restore the saved settings" in text
    assert [words for words in differences if words not in text] == [], text
    assert begun() == before, "the record of the run is left alone"


@pytest.mark.slow
def test_another_model_cannot_continue_a_run(refusal, begun):
    before = begun()
    hidden = "--config.model.hidden=128"  # 3 arrays, each with a target and two moments
    text = refusal(*RESUMED, hidden, "--resume=changed", train=training.train, lines=1 + 3 * 4)
    assert "holds another model. Use the config it was saved with" in text
    assert "misshapen: params/encoder/blocks/mlp/up/kernel is float32[2, 32, 64]" in text
    assert begun() == before
