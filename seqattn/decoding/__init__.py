"""From any step function to sequences."""

from seqattn.decoding.generate import Generated, generate

__all__ = ["Generated", "generate"]
