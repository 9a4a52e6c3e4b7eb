"""Attention of a few queries to a cache, for NVIDIA Hopper in Pallas Mosaic GPU: it reads only tiles that are seen."""

from seqattn.kernels.hopper_cached.kernel import attend, refuse

__all__ = ["attend", "refuse"]
