"""Configs, launch, preflight, reproduction: the only package that knows flags and ConfigDicts."""
