"""The registry of jobs: a config's `job` names one of these functions of (settings, workdir) -> exit code."""

from common.checkpoint import DamagedError, StructureError
from common.config import ConfigError
from experiments import jepa_pretrain, metaopt_job, metaopt_table1

JOBS = {
    "jepa_pretrain": jepa_pretrain.run,
    "metaopt_grid": metaopt_job.run,
    "metaopt_table1": metaopt_table1.run,
}

# What a user can cause and mend: reported as one line. Anything else is our bug and keeps its traceback.
KNOWN_ERRORS = (ConfigError, StructureError, DamagedError)
