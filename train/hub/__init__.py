"""A model for others: safetensors, model card, StableHLO, the hub."""
