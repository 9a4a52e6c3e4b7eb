"""Export of trained models: safetensors, model card, StableHLO, upload to the Hugging Face hub."""
