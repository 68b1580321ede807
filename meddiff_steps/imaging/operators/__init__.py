"""Measurement operators: what a scanner does to an image, a file per kind, and its adjoint."""
