"""Benchmarks attention against other libraries: `python -m benchmarks.attention`."""
