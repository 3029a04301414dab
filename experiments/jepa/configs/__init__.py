"""I-JEPA experiments. `base.py` holds what they share."""
