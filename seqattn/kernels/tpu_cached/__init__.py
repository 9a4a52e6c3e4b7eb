"""Attention of a few queries to a cache, for TPUs in Pallas: it reads only the tiles that a query sees."""

from seqattn.kernels.tpu_cached.kernel import attend, refuse

__all__ = ["attend", "refuse"]
