"""What a step of a small model computes, to the bit, and a fingerprint of the program that computes it.

Where the optimised program is the one that was recorded, its numbers must be the recorded ones to the bit. Another
program, which is what a change of the code makes, must come within 1e-6, and one of another jax within 1e-5.

When a change of the numbers is meant (a step that is defined otherwise, never one that should only be faster):
`RENEW_GOLDEN=1 python -m pytest -n 0 tests/golden/test_steps_*.py`, read the diff, and say in the commit why they change.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

JAX = "0.10.2"  # recorded with it
RTOL = 1e-6 if jax.__version__ == JAX else 1e-5  # of the largest value of an array
# bfloat16 and int8 products on another program.
ROUNDED = 2e-2


def fingerprint(compiled: jax.stages.Compiled) -> str:
    """A hash of the optimised program without what names its source: file, line, function."""
    text = compiled.as_text()
    assert text is not None
    text = re.sub(r", metadata=\{[^{}]*\}|, ?frontend_attributes=\{[^{}]*\}", "", text)
    text = re.sub(r"^(HloModule )\S+", r"\1", text)
    # The tables of files and functions that follow the module's first line on newer versions.
    text = "\n".join(
        line
        for line in text.splitlines()
        if not re.match(r"\d+ |FileNames|Function|Stack|FileLoc", line)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check(
    path: Path, name: str, compiled: jax.stages.Compiled, outputs: Any, rounded: bool
) -> None:
    """Compares `outputs`, a tree of arrays, with the record `name` in the JSON file `path`; see the module.

    `rounded`: products are of bfloat16 or int8, which another program rounds to the other side here and there.
    """
    leaves = jax.tree_util.tree_leaves_with_path(outputs)
    got = {jax.tree_util.keystr(p): np.asarray(x, np.float64).ravel().tolist() for p, x in leaves}
    program = fingerprint(compiled)
    if os.environ.get("RENEW_GOLDEN"):
        _record(path, name, {"program": program, "values": got})
        return
    want = json.loads(path.read_text())[name]
    assert got.keys() == want["values"].keys()
    for key, values in got.items():
        says = f"{path.name}: {name}{key} changed; see tests/golden/steps.py for what to do"
        if program == want["program"]:
            assert values == want["values"][key], says
        else:
            recorded = np.asarray(want["values"][key])
            within = (ROUNDED if rounded else RTOL) * np.abs(recorded).max()
            np.testing.assert_allclose(values, recorded, rtol=0, atol=within, err_msg=says)


def _record(path: Path, name: str, entry: dict) -> None:
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[name] = entry
    text = json.dumps(dict(sorted(entries.items())), indent=1)
    numbers_in_a_row = re.sub(r"\[[^\[\]]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text)
    path.write_text(numbers_in_a_row + "\n")
