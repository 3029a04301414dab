"""One file an experiment: `get_config(arg)` returns data, nothing else."""
