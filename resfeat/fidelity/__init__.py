"""Is the embedding the right one: parity with fp32, on a sample of the images."""
