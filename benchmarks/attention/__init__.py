"""What attention costs, here and in other libraries: `python -m benchmarks.attention`."""
