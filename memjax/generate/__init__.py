"""Generation through a cache."""
