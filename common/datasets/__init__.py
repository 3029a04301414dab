"""Datasets of our own as TFDS builders; with `common/data.py` the only place to import tfds."""
