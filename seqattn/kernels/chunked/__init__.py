"""Tiled attention over blocks of queries and keys: O(T + S) memory, forward and backward, on any device."""

from seqattn.kernels.chunked.kernel import attend, note, refuse
from seqattn.kernels.chunked.plan import find

__all__ = ["attend", "find", "note", "refuse"]
