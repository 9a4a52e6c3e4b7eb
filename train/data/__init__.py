"""Text to batches: tokenizer, packing, batches, word vectors."""
