"""The parts that policies are chained from: functions with the names and arguments of the string form."""

from __future__ import annotations

from memjax.cache.policy import CachePolicy, Windows
from memjax.evict import Streaming
from memjax.offload import HostTier
from memjax.quantize import (
    NF4,
    NVFP4,
    Fp8,
    FrontEnd,
    Int2,
    Int4,
    Int8,
    KeyValueCodec,
    Kivi,
    KVarN,
    TurboQuant,
)
from memjax.quantize.front import ALL


def dense() -> CachePolicy:
    """Keeps every token in the cache's dtype."""
    return CachePolicy()


def _coded(codec: KeyValueCodec, centre: str, balance: str, calibration: str, pairs: int) -> CachePolicy:
    if calibration and (centre, balance) == (codec.front.centre, codec.front.balance):
        centre = balance = "auto"  # neither was said
    front = FrontEnd(centre, balance, calibration, pairs)
    return CachePolicy(codec=codec, front=None if front == codec.front else front)


def int8(
    rotate: bool = False, centre: str = "none", balance: str = "off", calibration: str = "", pairs: int = ALL
) -> CachePolicy:
    """Token-wise int8, see ``memjax.quantize.int8``; for the other arguments ``memjax.quantize.front``, here and below."""
    return _coded(Int8(rotate), centre, balance, calibration, pairs)


def int4(
    rotate: bool = False, centre: str = "none", balance: str = "off", calibration: str = "", pairs: int = ALL
) -> CachePolicy:
    """Token-wise int4, see ``memjax.quantize.int4``."""
    return _coded(Int4(rotate), centre, balance, calibration, pairs)


def int2(
    rotate: bool = False, centre: str = "none", balance: str = "off", calibration: str = "", pairs: int = ALL
) -> CachePolicy:
    """Token-wise int2, see ``memjax.quantize.int2``."""
    return _coded(Int2(rotate), centre, balance, calibration, pairs)


def fp8(
    format: str = "e4m3",
    rotate: bool = False,
    centre: str = "none",
    balance: str = "off",
    calibration: str = "",
    pairs: int = ALL,
) -> CachePolicy:
    """Token-wise float8, see ``memjax.quantize.fp8``."""
    return _coded(Fp8(rotate, format), centre, balance, calibration, pairs)


def nf4(centre: str = "none", balance: str = "off", calibration: str = "", pairs: int = ALL) -> CachePolicy:
    """Token-wise NormalFloat4, see ``memjax.quantize.blocks``."""
    return _coded(NF4(), centre, balance, calibration, pairs)


def nvfp4(centre: str = "none", balance: str = "off", calibration: str = "", pairs: int = ALL) -> CachePolicy:
    """4-bit floats in blocks of 16 channels, see ``memjax.quantize.blocks``."""
    return _coded(NVFP4(), centre, balance, calibration, pairs)


def turboquant(
    key_bits: int = 4,
    value_bits: int = 4,
    scale: str = "search",
    grid: str = "lloyd",
    rotation: str = "hadamard",
    centre: str = "auto",
    balance: str = "auto",
    calibration: str = "",
    pairs: int = ALL,
) -> CachePolicy:
    """TurboQuant, see ``memjax.quantize.turboquant``; with ``centre=none, balance=off, scale=norm`` the paper's own."""
    return _coded(TurboQuant(key_bits, value_bits, scale, grid, rotation), centre, balance, calibration, pairs)


def kivi(
    bits: int = 2, group: int = 32, centre: str = "none", balance: str = "off", calibration: str = "", pairs: int = ALL
) -> CachePolicy:
    """KIVI, see ``memjax.quantize.kivi``."""
    return _coded(Kivi(bits, group), centre, balance, calibration, pairs)


def kvarn(
    key_bits: int = 4,
    value_bits: int = 2,
    tile: int = 128,
    iterations: int = 8,
    centre: str = "none",
    balance: str = "off",
    calibration: str = "",
    pairs: int = ALL,
) -> CachePolicy:
    """KVarN, see ``memjax.quantize.kvarn``."""
    return _coded(KVarN(key_bits, value_bits, tile, iterations), centre, balance, calibration, pairs)


def streaming(sinks: int = 4, window: int = 1020, positions: str = "cache") -> CachePolicy:
    """Attention sinks and a sliding window, see ``memjax.evict.streaming``."""
    return CachePolicy(evictor=Streaming(sinks, window, positions))


def host(resident: int = 256, page: int = 256) -> CachePolicy:
    """History in host memory, see ``memjax.offload.host``."""
    return CachePolicy(tier=HostTier(resident, page))


def protect(sinks: int = 4, recent: int = 64) -> CachePolicy:
    """Keeps the first and the newest tokens dense."""
    return CachePolicy(windows=Windows(sinks, recent))


def kernels(name: str = "pallas") -> CachePolicy:
    """Reads the history with ``pallas`` (the Pallas kernels of the device at hand, experimental ones too) or with ``xla``.

    Kernels serve all attention over the history; what a kernel cannot serve raises and says why.

    Raises:
      ValueError: another name.
    """
    return CachePolicy(kernels=name)
