"""What an update costs, here and in other libraries: `python -m benchmarks.training`."""
