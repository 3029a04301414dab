"""Gradient Descent: The Ultimate Optimizer. `base.py` holds what the configs share."""
