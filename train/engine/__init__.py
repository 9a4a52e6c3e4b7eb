"""A training run: start or resume, training loop, signals and early stopping."""
