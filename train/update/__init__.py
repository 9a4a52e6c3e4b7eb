"""One update: gradients, the optimizer, what is frozen, how parameters begin."""
