"""Attention for TPUs in Pallas, for any mask and score function, in tiles: see `kernel`."""

from seqattn.kernels.tpu.kernel import attend, refuse

__all__ = ["attend", "refuse"]
