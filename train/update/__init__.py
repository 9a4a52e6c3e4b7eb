"""One training update: gradients, optimizers, schedules, frozen parameters and initializers."""
