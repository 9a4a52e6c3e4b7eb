"""Attention for NVIDIA Hopper in Pallas Mosaic GPU, for any mask and score function, in tiles: see `kernel`."""

from seqattn.kernels.hopper.kernel import attend, refuse

__all__ = ["attend", "refuse"]
