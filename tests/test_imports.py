"""Each module of the three papers can be the first that a program imports: no order of imports is assumed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EACH_FIRST = """
import importlib, pathlib, sys
import jax, flax.nnx
PACKAGES = ("jepa", "sinks", "metaopt")
paths = [path.with_suffix("") for name in PACKAGES for path in pathlib.Path(name).rglob("*.py")]
names = [".".join(path.parts) for path in paths if not path.name.startswith("__")]
for name in names:
    for loaded in [m for m in sys.modules if m.partition(".")[0] in PACKAGES]:
        del sys.modules[loaded]
    importlib.import_module(name)
print(len(names))
import sinks  # loads its modules when they are asked for
assert sinks.stream.extend and sinks.load and sinks.Model and not hasattr(sinks, "nothing")
"""


@pytest.mark.slow
def test_each_module_can_be_the_first_that_is_imported():
    command = [sys.executable, "-c", EACH_FIRST]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) > 50, done.stderr
