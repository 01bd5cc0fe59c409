"""Ada-KV: the heads of a layer share one budget, those with more attention to keep get more of it (arXiv 2407.11550).

SnapKV's pooled scores, compared over all kv heads of a layer: of K C tokens that the layer keeps (C: the budget less the
protected tokens) each head first keeps its own best floor(alpha C), the best of all heads fill the rest. alpha = 1 is SnapKV.

The bytes are real. The heads' histories are one pool of K C slots, each with its owner: codes [B, 1, .., K C], and per slot
position (int32), score (float32) and owner (int8). Attention reads the pool once, for the queries of all heads; one
channel more per head, that of the slot's owner in the keys and in the queries all others, lowers the logits of other heads'
slots by 2^14: exp of that is 0, exactly, and nothing is added to the head's own. The price is compute: every query meets the
slots of all K heads, which matters to long chunks, and to a decode step where it does not wait for memory anyway. The
owners' channels, K numbers of the queries' dtype per slot, exist only while they are read; on a mesh each device of the head
axis has the whole pool.

Deviations. As SnapKV's. The floor is kvpress' (its alpha 0.2); the authors' code rounds (1 - alpha) c_h + alpha C with c_h
the head's share of the unrestricted choice, and alpha 0.5, which moves a head with few good tokens less far below the mean.
A decode step brings a token of every head and takes away the K worst of the layer, floors apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memjax.evict.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV with counts per head; ``budget`` is the mean over the heads of a layer.

    Args:
      alpha: the part of the mean that every head keeps at least.

    Raises:
      ValueError: as ``SnapKV``; alpha outside 0..1.

    >>> AdaKV(256).floor(188)
    37
    """

    name: ClassVar[str] = "adakv"
    joint: ClassVar[bool] = True
    instead: ClassVar[str] = "use snapkv"
    alpha: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise ValueError(f"adakv needs alpha between 0 and 1, got {self.alpha!r}")

    @property
    def shares_slots(self) -> bool:
        return True

    def floor(self, slots: int) -> int:
        """Tokens that each head keeps at least, where ``slots`` is the mean."""
        return int(self.alpha * slots)
