"""Attention for NVIDIA Hopper in Pallas Mosaic GPU, for any mask and score function, in tiles: see `kernel`."""

from seqattn.kernels.hopper.kernel import attend, note, refuse

__all__ = ["attend", "note", "refuse"]
