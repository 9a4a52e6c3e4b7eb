"""Benchmarks updates against other libraries: `python -m benchmarks.training`."""
