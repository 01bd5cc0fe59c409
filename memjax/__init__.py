"""memjax: small memory for LLM inference in JAX."""
