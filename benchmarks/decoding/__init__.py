"""What decoding costs, here and in other libraries: `python -m benchmarks.decoding`."""
