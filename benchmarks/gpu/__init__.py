"""Ours on a GPU beside the peers' way: `make bench-gpu`, or `python -m benchmarks.gpu --help`."""
