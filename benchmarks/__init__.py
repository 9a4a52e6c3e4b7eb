"""Benchmarks of attention, decoding and training: time and memory, compared with other libraries."""
