"""Compiles programs for TPUs and GPUs on a machine that has neither: `python -m benchmarks.compile`."""
