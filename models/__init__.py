"""Flax (NNX) models, and the checkpoints they come from."""
