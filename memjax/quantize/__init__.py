"""Codecs: in how many bits a vector is kept. One method, one file."""

from memjax.quantize.auto import Auto, ByHead, Pair
from memjax.quantize.blocks import NF4, NVFP4
from memjax.quantize.codec import Codec, Dense, KeyValueCodec
from memjax.quantize.fp8 import Fp8
from memjax.quantize.front import FrontEnd
from memjax.quantize.gear import Gear
from memjax.quantize.int2 import Int2
from memjax.quantize.int4 import Int4
from memjax.quantize.int8 import Int8
from memjax.quantize.kivi import Kivi
from memjax.quantize.kvarn import KVarN
from memjax.quantize.progressive import Progressive
from memjax.quantize.turboquant import TurboQuant
from memjax.quantize.zipcache import ZipCache

__all__ = [
    "NF4",
    "NVFP4",
    "Auto",
    "ByHead",
    "Codec",
    "Dense",
    "Fp8",
    "FrontEnd",
    "Gear",
    "Int2",
    "Int4",
    "Int8",
    "KVarN",
    "KeyValueCodec",
    "Kivi",
    "Pair",
    "Progressive",
    "TurboQuant",
    "ZipCache",
]
