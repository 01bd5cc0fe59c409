"""Evictors: which tokens stay. One method, one file."""

from memjax.evict.streaming import Streaming

__all__ = ["Streaming"]
