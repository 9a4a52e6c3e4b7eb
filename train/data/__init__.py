"""From texts to batches: tokenizers, packing, batches, pretrained word vectors, standard input."""
