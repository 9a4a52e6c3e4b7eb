"""Timing, records, tables and charts that all benchmarks share."""
