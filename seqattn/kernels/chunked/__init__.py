"""Attention over tiles of queries and keys: memory O(T + S), forward and backward, on any device."""

from seqattn.kernels.chunked.kernel import attend, refuse

__all__ = ["attend", "refuse"]
