"""How a cache is read: rotary embeddings, attention per segment, the merge."""
