"""The registry of jobs: a config's `job` names one of these functions of (settings, workdir) -> exit code."""

from common.checkpoint import DamagedError, StructureError
from common.config import ConfigError
from experiments import (
    jepa_pretrain,
    metaopt_job,
    metaopt_table1,
    sinks_attention_map,
    sinks_perplexity,
    sinks_pretrain,
    sinks_speed,
    sinks_tasks,
)

JOBS = {
    "jepa_pretrain": jepa_pretrain.run,
    "metaopt_grid": metaopt_job.run,
    "metaopt_table1": metaopt_table1.run,
    "sinks_perplexity": sinks_perplexity.run,
    "sinks_speed": sinks_speed.run,
    "sinks_attention_map": sinks_attention_map.run,
    "sinks_streameval": sinks_tasks.run_streameval,
    "sinks_pretrain": sinks_pretrain.run,
    "sinks_qa_stream": sinks_tasks.run_qa_stream,
}

# What a user can cause and mend: reported as one line. Anything else is our bug and keeps its traceback.
KNOWN_ERRORS = (ConfigError, StructureError, DamagedError)
