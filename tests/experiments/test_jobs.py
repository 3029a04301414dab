"""Every job that a config can name exists, and finding one loads no other paper."""

import subprocess
import sys

import pytest

from common.config import ConfigError
from experiments.jobs import JOBS, find


@pytest.mark.parametrize("name", JOBS)
def test_every_job_is_a_function(name):
    assert callable(find(name))


def test_an_unknown_job_names_those_there_are():
    with pytest.raises(ConfigError, match=r"config\.job='jepa_pretrian' is unknown.*sinks_speed"):
        find("jepa_pretrian")


def test_a_run_loads_its_own_paper_only():
    code = (
        "import sys; from experiments.jobs import find; find('jepa_pretrain'); "
        "print([m for m in ('sinks.stream', 'tokenizers', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stderr
