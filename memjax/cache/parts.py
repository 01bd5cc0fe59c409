"""The parts that policies are chained from: functions with the names and arguments of the string form."""

from __future__ import annotations

from memjax.cache.policy import CachePolicy, Windows
from memjax.evict import (
    H2O,
    AdaKV,
    DropKV,
    Duo,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    KVCompose,
    KVzip,
    MassFold,
    PyramidKV,
    Quest,
    SnapKV,
    Streaming,
    Tova,
)
from memjax.offload import HostTier
from memjax.quantize import (
    NF4,
    NVFP4,
    Auto,
    Fp8,
    FrontEnd,
    Gear,
    Int2,
    Int4,
    Int8,
    KeyValueCodec,
    Kivi,
    KVarN,
    Progressive,
    TurboQuant,
    ZipCache,
)
from memjax.quantize.auto import byte_count
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
    rotate: bool = False, centre: str = "auto", balance: str = "auto", calibration: str = "", pairs: int = ALL
) -> CachePolicy:
    """Token-wise int8, see ``memjax.quantize.int8``; for the other arguments ``memjax.quantize.front``, here and below."""
    return _coded(Int8(rotate), centre, balance, calibration, pairs)


def int4(
    rotate: bool = False, centre: str = "auto", balance: str = "auto", calibration: str = "", pairs: int = ALL
) -> CachePolicy:
    """Token-wise int4, see ``memjax.quantize.int4``."""
    return _coded(Int4(rotate), centre, balance, calibration, pairs)


def int2(
    rotate: bool = False, centre: str = "auto", balance: str = "auto", calibration: str = "", pairs: int = ALL
) -> CachePolicy:
    """Token-wise int2, see ``memjax.quantize.int2``."""
    return _coded(Int2(rotate), centre, balance, calibration, pairs)


def fp8(
    format: str = "e4m3",
    rotate: bool = False,
    centre: str = "auto",
    balance: str = "auto",
    calibration: str = "",
    pairs: int = ALL,
) -> CachePolicy:
    """Token-wise float8, see ``memjax.quantize.fp8``."""
    return _coded(Fp8(rotate, format), centre, balance, calibration, pairs)


def nf4(centre: str = "auto", balance: str = "auto", calibration: str = "", pairs: int = ALL) -> CachePolicy:
    """Token-wise NormalFloat4, see ``memjax.quantize.blocks``."""
    return _coded(NF4(), centre, balance, calibration, pairs)


def nvfp4(centre: str = "auto", balance: str = "auto", calibration: str = "", pairs: int = ALL) -> CachePolicy:
    """4-bit floats in blocks of 16 channels, see ``memjax.quantize.blocks``."""
    return _coded(NVFP4(), centre, balance, calibration, pairs)


def turboquant(
    key_bits: float = 4,
    value_bits: float = 4,
    scale: str = "search",
    grid: str = "lloyd",
    rotation: str = "hadamard",
    centre: str = "auto",
    balance: str = "auto",
    calibration: str = "",
    pairs: int = ALL,
) -> CachePolicy:
    """TurboQuant, see ``memjax.quantize.turboquant``; with ``centre=none, balance=off, scale=norm`` the paper's own.

    Bits are 2, 3, 4, or 2.5 and 3.5 by a split of the channels (``memjax.quantize.channel_split``).
    """
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


def zipcache(
    salient_bits: int = 4,
    rest_bits: int = 2,
    tile: int = 160,
    group: int = 32,
    share: float = 0.6,
    centre: str = "none",
    balance: str = "off",
    calibration: str = "",
    pairs: int = ALL,
) -> CachePolicy:
    """ZipCache, see ``memjax.quantize.zipcache``."""
    return _coded(ZipCache(salient_bits, rest_bits, tile, group, share), centre, balance, calibration, pairs)


def h2o(budget: int = 0, fraction: float = 0.0, normalised: bool = False, bytes: str | int = "") -> CachePolicy:
    """Heavy hitters, see ``memjax.evict.h2o``; a budget in tokens, a fraction of the capacity, or bytes, here and below.

    Args:
      bytes: of a model's whole cache on the device, at most: a number, or a text such as "64MiB".
    """
    return CachePolicy(evictor=H2O(budget, fraction, normalised, bytes=byte_count(bytes)))


def tova(budget: int = 0, fraction: float = 0.0, bytes: str | int = "") -> CachePolicy:
    """The newest query's attention, see ``memjax.evict.tova``."""
    return CachePolicy(evictor=Tova(budget, fraction, bytes=byte_count(bytes)))


def snapkv(
    budget: int = 0, fraction: float = 0.0, window: int = 32, kernel: int = 5, pool: str = "avg", bytes: str | int = ""
) -> CachePolicy:
    """Attention of the last queries, pooled, see ``memjax.evict.snapkv``."""
    return CachePolicy(evictor=SnapKV(budget, fraction, window, kernel, pool, bytes=byte_count(bytes)))


def pyramidkv(
    budget: int = 0, window: int = 32, kernel: int = 5, pool: str = "avg", beta: int = 20, bytes: str | int = ""
) -> CachePolicy:
    """SnapKV with budgets that fall from layer to layer, see ``memjax.evict.pyramidkv``."""
    return CachePolicy(evictor=PyramidKV(budget, 0.0, window, kernel, pool, beta, bytes=byte_count(bytes)))


def dropkv(
    budget: int = 0, fraction: float = 0.0, window: int = 32, kernel: int = 7, pool: str = "avg", bytes: str | int = ""
) -> CachePolicy:
    """Outputs without a token, see ``memjax.evict.dropkv``."""
    return CachePolicy(evictor=DropKV(budget, fraction, window, kernel, pool, bytes=byte_count(bytes)))


def adakv(
    budget: int = 0,
    fraction: float = 0.0,
    window: int = 32,
    kernel: int = 5,
    pool: str = "avg",
    alpha: float = 0.2,
    bytes: str | int = "",
) -> CachePolicy:
    """SnapKV with one budget for the heads of a layer, see ``memjax.evict.adakv``."""
    return CachePolicy(evictor=AdaKV(budget, fraction, window, kernel, pool, alpha, bytes=byte_count(bytes)))


def knorm(budget: int = 0, fraction: float = 0.0, bytes: str | int = "") -> CachePolicy:
    """Small keys stay, see ``memjax.evict.knorm``."""
    return CachePolicy(evictor=Knorm(budget, fraction, bytes=byte_count(bytes)))


def keydiff(budget: int = 0, fraction: float = 0.0, bytes: str | int = "") -> CachePolicy:
    """Keys unlike the others stay, see ``memjax.evict.keydiff``."""
    return CachePolicy(evictor=KeyDiff(budget, fraction, bytes=byte_count(bytes)))


def expected_attention(
    budget: int = 0, fraction: float = 0.0, horizon: int = 512, epsilon: float = 0.0, bytes: str | int = ""
) -> CachePolicy:
    """Attention of queries still to come, see ``memjax.evict.expected_attention``."""
    return CachePolicy(evictor=ExpectedAttention(budget, fraction, horizon, epsilon, bytes=byte_count(bytes)))


def kvzip(budget: int = 0, fraction: float = 0.0, across: str = "model", bytes: str | int = "") -> CachePolicy:
    """What a repetition of the prompt looks at, see ``memjax.evict.kvzip``; a fraction of the prompt, here and below."""
    return CachePolicy(evictor=KVzip(budget, fraction, across, bytes=byte_count(bytes)))


def kvcompose(budget: int = 0, fraction: float = 0.0, bytes: str | int = "") -> CachePolicy:
    """Composite tokens of all layers, see ``memjax.evict.kvcompose``."""
    return CachePolicy(evictor=KVCompose(budget, fraction, bytes=byte_count(bytes)))


def massfold() -> CachePolicy:
    """Tokens that an evictor with a budget lets go are folded into those that stay, see ``memjax.evict.massfold``."""
    return CachePolicy(fold=MassFold())


def quest(budget: int = 0, page: int = 16, dense_layers: int = 2) -> CachePolicy:
    """Keeps everything and reads the pages that may matter, ``budget`` tokens per kv head; see ``memjax.evict.quest``."""
    return CachePolicy(evictor=Quest(budget, page, dense_layers))


def duo(
    share: float = 0.5, sinks: int = 64, window: int = 256, file: str = "", multiple: int = 1, heads: str = ""
) -> CachePolicy:
    """A part of the heads keeps every token, the others sinks and a window; see ``memjax.evict.duo``.

    Args:
      share: of all the model's kv heads, those that keep everything.
      sinks, window: what the others keep.
      file: written by ``memjax gates``; "": the one of smollm2-135m that memjax brings along.
      multiple: of which number a layer keeps heads of each kind: the devices over which a mesh spreads them.
      heads: for one layer by itself, instead of share and file: "101" for three heads of which the middle one streams.
    """
    return CachePolicy(evictor=Duo(share, sinks, window, file, multiple, heads))


def auto(
    bits: float = 0.0,
    bytes: str | int = "",
    file: str = "",
    by_head: bool = False,
    centre: str = "auto",
    balance: str = "auto",
    calibration: str = "",
    pairs: int = ALL,
) -> CachePolicy:
    """TurboQuant with bits by measured sensitivity for each layer's keys and values, see ``memjax.quantize.auto``.

    Args:
      bits: realised bits per value on average, at most; 0: as ``bytes`` says, or 3.25 without it.
      bytes: of the whole cache on the device, at most: a number, or a text such as "64MiB".
      file: written by ``memjax sensitivity``; "": the one of smollm2-135m that memjax brings along.
      by_head: bits for each kv head, too; with evictors whose heads decide for themselves.
    """
    count = byte_count(bytes)
    return _coded(Auto(3.25 if bits == 0 and not count else bits, count, file, by_head), centre, balance, calibration, pairs)


def progressive(
    refine: float = 0.25,
    page: int = 128,
    share: float = 0.01,
    margin: float = 3.0,
    centre: str = "auto",
    balance: str = "auto",
    calibration: str = "",
    pairs: int = ALL,
) -> CachePolicy:
    """Nested 2 + 1-bit codes, read in full where it matters; see ``memjax.quantize.progressive``."""
    return _coded(Progressive(refine, page, share, margin), centre, balance, calibration, pairs)


def gear(base: str | CachePolicy = "int4", rank: int = 4, sparse: float = 0.0) -> CachePolicy:
    """A low-rank correction of what ``base`` loses, and a share of outliers apart, see ``memjax.quantize.gear``.

    The front end is the base's.

    Raises:
      ValueError: a base that says more than a codec, or none that can be corrected.
    """
    if not isinstance(base, CachePolicy):
        from memjax.cache.parse import policy  # which knows all parts, this one too

        base = policy(base)
    if base != CachePolicy(codec=base.codec, front=base.front):
        raise ValueError(f"gear corrects a codec such as int4 and nothing else, got {base}; chain the rest behind it")
    return CachePolicy(codec=Gear(base.codec, rank, sparse), front=base.front)


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
