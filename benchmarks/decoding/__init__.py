"""Benchmarks decoding against other libraries: `python -m benchmarks.decoding`."""
