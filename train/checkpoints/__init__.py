"""Run folders: checkpoints, their digests, locking, and loading a trained model."""
