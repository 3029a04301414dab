"""Makes runs.tar.xz: a workdir of every job as the code of commit 1e20e9a left it, most of them stopped half-way.

In a checkout of that commit: `python - OUT < THIS_FILE` writes OUT.tar.xz, with OUT an absolute path. The folder that the
runs were started in has the inputs: `model`, a small Llama with random weights, and `book.txt`.
"""

import json
import os
import signal
import sys
import tarfile
from pathlib import Path

JEPA = [
    *(
        f"--config.model.{name}"
        for name in ("depth=1", "width=16", "hidden=32", "predictor_width=8")
    ),
    *("--config.train.steps=5", "--config.checkpoint.keep=1", "--config.probe.linear=false"),
]
GRID = "metaopt/mnist_towers.py:smoke"
PRETRAIN = [
    *(f"--config.model.{name}" for name in ("depth=1", "width=16", "mlp_dim=32")),
    *(
        "--config.train.steps=5",
        "--config.data.text=book.txt",
        "--config.variants=('vanilla','zero')",
    ),
]
# Name -> the config, what the command line changes, and at which save the run is stopped (0: it ends by itself).
RUNS = {
    "jepa": ("jepa/scenes.py:smoke", JEPA, 1),
    "jepa_auto": ("jepa/scenes.py:smoke", [*JEPA, "--config.optim.auto=true"], 1),
    "jepa_baselines": ("jepa/scenes.py:smoke", ["--config.job=jepa_baselines"], 0),
    "sgd": (GRID, ["--config.methods=('sgd',)"], 1),
    "learned": (GRID, ["--config.methods=('auto(sgd)',)"], 1),
    "tower": (GRID, ["--config.methods=('tower1(sgd)',)"], 1),
    "grid_done": (GRID, [], 0),
    "table1": ("metaopt/mnist_table1.py:smoke", [], 3),
    "perplexity": ("sinks/perplexity.py:smoke,model=model,text=book.txt", [], 5),
    "pretrain": ("sinks/pretrain.py:smoke", PRETRAIN, 4),
    "speed": ("sinks/speed.py:smoke,model=model", ["--config.policies=('window','sinks')"], 0),
    "streameval": ("sinks/streameval.py:smoke,model=model", [], 0),
    "qa_stream": ("sinks/qa_stream.py:smoke,model=model", [], 0),
    "attention_map": ("sinks/attention_map.py:smoke,model=model,text=book.txt", [], 0),
}
KNOW_NO_SIGNAL = ("sgd", "learned", "tower", "table1")
TEXT = "".join(f"{i} times {j} is {i * j}.\n" for i in range(1, 31) for j in range(1, 31))


class Killed(BaseException):
    """Nothing catches it, as nothing can catch a kill."""


def run(name: str) -> None:
    config, settings, saves = RUNS[name]
    from common.checkpoint import Checkpointer
    from experiments import launch

    save, count = Checkpointer.save, 0

    def counted(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == saves and name not in KNOW_NO_SIGNAL:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, *args, **kwargs | {"wait": True})
        if count == saves and name in KNOW_NO_SIGNAL:
            raise Killed

    Checkpointer.save = counted
    path, workdir = f"{os.environ['ROOT']}/experiments/configs/{config}", Path(name).absolute()
    sys.argv = ["launch", f"--config={path}", f"--workdir={workdir}", *settings]
    try:
        print(name, "exit code", launch.main(sys.argv), flush=True)
    except Killed:
        print(name, "killed", flush=True)
    if name in ("speed", "streameval", "qa_stream"):
        halve(workdir)


def halve(workdir: Path) -> None:
    """As if the job had been killed on its way: its last part is not measured, and there is no result."""
    for end in ("result.json", "results.jsonl", "table.md"):
        (workdir / end).unlink(missing_ok=True)
    if (path := workdir / "measured.json").exists():
        kept = json.loads(path.read_text())
        kept["ms"].popitem()
        path.write_text(json.dumps(kept))
    if (path := workdir / "rows.jsonl").exists():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def chat() -> None:
    import jax

    import sinks
    from sinks import stream
    from sinks.cache import CacheSpec
    from sinks.chat import Conversation
    from sinks.sampling import Sampling

    model = sinks.load("model")
    model = model._replace(params=stream.prepare(model.params))
    talk = Conversation(model, CacheSpec(2, 30), Sampling(1.0), jax.random.key(0))
    list(talk.answer("Hello", limit=5))
    talk.save(str(Path("chat").absolute()))
    print("chat", talk.length)


def apart(function, *args) -> None:
    """In a process of its own: jax starts afresh, and what it prints comes in order."""
    if (child := os.fork()) == 0:
        function(*args)
        os._exit(0)
    os.waitpid(child, 0)


def model() -> None:
    from tests.sinks.checkpoints import byte_level_folder

    byte_level_folder(Path("model"))


def pack(path: Path) -> None:
    no_pictures = lambda found: None if found.name.endswith(".png") else found  # noqa: E731
    with tarfile.open(path, "w:xz") as packed:
        packed.add(".", filter=no_pictures)


if __name__ == "__main__":
    os.environ["ROOT"] = os.getcwd()
    sys.path.insert(0, os.getcwd())
    out = Path(sys.argv[1])
    out.mkdir()
    os.chdir(out)
    Path("book.txt").write_text(TEXT)
    apart(model)
    for one in RUNS:
        apart(run, one)
    apart(chat)
    pack(out.with_suffix(".tar.xz"))
