"""Our way beside the peers', side by side: `python -m benchmarks --help`."""
