"""Tiers: where the bytes of a cache live. One method, one file."""

from memjax.offload.host import HostTier

__all__ = ["HostTier"]
