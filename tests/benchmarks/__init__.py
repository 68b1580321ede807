"""Our way beside the peers', side by side: `python -m tests.benchmarks --help`."""
