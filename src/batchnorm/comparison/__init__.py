"""Comparison of the computations of two models, and of the contents of two checkpoints."""
