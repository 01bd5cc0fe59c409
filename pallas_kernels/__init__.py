"""Kernels over plain arrays and packed codes; they know nothing of caches or models."""
