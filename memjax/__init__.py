"""memjax: small memory for LLM inference in JAX.

    import memjax as mj

    model = mj.load("smollm2-135m")
    print(mj.generate(model, "The capital of Japan is", policy="streaming(4,1020)+int4(rotate=true)")[0].text)

Importing memjax is cheap and touches no device; every name below is imported when it is first used. ``mj.generate`` is
the package ``memjax.generate``, which can be called; whole-cache transforms are ``mj.cache.quantize`` and its like.
"""

from __future__ import annotations

from memjax import _compat as _compat
from memjax._lazy import attach

_NAMES = {
    "memjax.cache": (),
    "memjax.generate": (),
    "memjax.attention.rope": ("Rope",),
    "memjax.cache.layer": ("LayerCache", "commit", "update"),
    "memjax.cache.ledger": ("Bytes", "nbytes", "predict_nbytes"),
    "memjax.cache.parse": ("policy",),
    "memjax.cache.parts": (
        "adakv",
        "auto",
        "dense",
        "dropkv",
        "duo",
        "expected_attention",
        "fp8",
        "h2o",
        "gear",
        "host",
        "int2",
        "int4",
        "int8",
        "kernels",
        "keydiff",
        "kivi",
        "knorm",
        "kvarn",
        "kvcompose",
        "kvzip",
        "massfold",
        "nf4",
        "nvfp4",
        "progressive",
        "protect",
        "pyramidkv",
        "quest",
        "snapkv",
        "streaming",
        "tova",
        "turboquant",
        "zipcache",
    ),
    "memjax.cache.policy": ("CachePolicy", "abstract", "attend", "chain", "per_layer", "protect_layers"),
    "memjax.cache.sharding": ("shardings",),
    "memjax.cache.spec": ("CacheSpec", "RecurrentSpec"),
    "memjax.generate.loop": ("Generation", "stream"),
    "memjax.generate.reread": ("compress",),
    "memjax.generate.sampling": ("Sampler", "sample"),
    "memjax.generate.steps": ("decode_step", "prefill"),
    "memjax.models.chat": ("render_chat",),
    "memjax.models.checkpoint": ("restore_model", "save_model"),
    "memjax.models.load": ("LanguageModel", "load"),
}
__version__ = "0.1.0"
__getattr__, __dir__, __all__ = attach(globals(), _NAMES)
