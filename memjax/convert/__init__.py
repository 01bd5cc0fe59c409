"""Turns trained models into models with smaller caches: grouped-query attention into latent attention, and its healing."""
