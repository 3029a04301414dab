"""CLEVR-like scenes with count, distance and shape labels, rendered here rather than downloaded.

`sample` draws a `Scene` from a seed and an index, `render` ray-casts it, `builder` writes the TFDS
dataset. `sample` and `render` need NumPy alone, so that worker processes start fast.
"""
