"""Evictors: which tokens stay, or are read. One method, one file."""

from memjax.evict.adakv import AdaKV
from memjax.evict.dropkv import DropKV
from memjax.evict.duo import Duo
from memjax.evict.evictor import Budgeted, Evictor, Limited
from memjax.evict.expected_attention import ExpectedAttention
from memjax.evict.h2o import H2O
from memjax.evict.keydiff import KeyDiff
from memjax.evict.knorm import Knorm
from memjax.evict.kvcompose import KVCompose
from memjax.evict.kvzip import KVzip
from memjax.evict.massfold import MassFold
from memjax.evict.pyramidkv import PyramidKV
from memjax.evict.quest import Quest
from memjax.evict.rereading import Rereading
from memjax.evict.snapkv import SnapKV
from memjax.evict.streaming import Streaming
from memjax.evict.tova import Tova

__all__ = [
    "H2O",
    "AdaKV",
    "Budgeted",
    "DropKV",
    "Duo",
    "Evictor",
    "ExpectedAttention",
    "KVCompose",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "Limited",
    "MassFold",
    "PyramidKV",
    "Quest",
    "Rereading",
    "SnapKV",
    "Streaming",
    "Tova",
]
