"""One way to time, to record, to show and to draw, which all benchmarks share."""
