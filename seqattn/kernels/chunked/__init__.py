"""Tiled attention over blocks of queries and keys: O(T + S) memory, forward and backward, on any device."""

from seqattn.kernels.chunked.kernel import attend, note, refuse

__all__ = ["attend", "note", "refuse"]
