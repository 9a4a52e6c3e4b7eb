"""Attention for TPUs in Pallas, for any mask and score function, in tiles: see `kernel`."""

from seqattn.kernels.tpu.kernel import attend, note, refuse
from seqattn.kernels.tpu.plan import find

__all__ = ["attend", "find", "note", "refuse"]
