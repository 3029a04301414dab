"""Datasets of our own as TFDS builders; beside `common/data.py`, the only place to import tfds."""
