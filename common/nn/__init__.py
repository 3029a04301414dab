"""Layers: flax defines them, plain JAX runs them."""
