"""Hypergradients as optax transformations (Chandra et al., NeurIPS 2022). Not built yet: see README's status table."""
