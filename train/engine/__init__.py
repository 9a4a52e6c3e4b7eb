"""A training run: begun or resumed, its loop, its signals, and when it stops."""
