"""Inference with a trained model: translation and completion of texts."""
