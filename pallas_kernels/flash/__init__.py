"""Flash attention over a segment of a compressed cache: output and log-sum-exp, mergeable with other segments."""

from memjax.pallas_kernels.flash.reference import attention_reference, visible
from memjax.pallas_kernels.flash.xla import attention_xla, merge

__all__ = ["attention_reference", "attention_xla", "merge", "visible"]
