"""Codecs: in how many bits a vector is kept. One method, one file."""

from memjax.quantize.codec import Codec, Dense
from memjax.quantize.fp8 import Fp8
from memjax.quantize.int4 import Int4
from memjax.quantize.int8 import Int8

__all__ = ["Codec", "Dense", "Fp8", "Int4", "Int8"]
