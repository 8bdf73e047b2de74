"""The bench of the matrix of all pairs: `python -m bench.pairs`."""
