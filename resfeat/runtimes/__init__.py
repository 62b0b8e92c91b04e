"""One model on one device: uint8 batches in, float32 embeddings out."""
