"""The cache: specs, pytrees, policies, ledgers, and the whole-cache transforms ``quantize``, ``evict``, ``offload``."""

from memjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    globals(),
    {
        "memjax.cache.layer": ("LayerCache", "commit", "update"),
        "memjax.cache.ledger": ("Bytes", "nbytes", "predict_nbytes"),
        "memjax.cache.policy": ("CachePolicy", "attend", "chain", "per_layer", "protect_layers"),
        "memjax.cache.sharding": ("shardings",),
        "memjax.cache.spec": ("CacheSpec", "RecurrentSpec"),
        "memjax.cache.transforms": ("evict", "offload", "quantize"),
    },
)
