"""Training: text, files, devices and clocks around the functions and modules of seqattn."""
