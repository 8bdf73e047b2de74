"""Benchmarks of the loss against its peers: `python -m bench.speed`, `python -m pytest bench --benchmark-only`."""
