"""Attention for TPUs in Pallas, for any mask and score function, in tiles: see `kernel`."""

from seqattn.kernels.tpu.kernel import attend, note, refuse

__all__ = ["attend", "note", "refuse"]
