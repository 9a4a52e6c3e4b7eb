"""Training, evaluation and export of the models of seqattn: data, optimizers, checkpoints, devices and commands."""
