"""Benchmarks of the loss against its peers; `python -m bench.speed --help` and `pytest bench/ --benchmark-only`."""
