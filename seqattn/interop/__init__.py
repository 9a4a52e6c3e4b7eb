"""Parameters of other libraries' models as ours, and back: arrays in, arrays out; files are the caller's."""

from seqattn.interop.marian import from_marian, marian_config, to_marian

__all__ = ["from_marian", "marian_config", "to_marian"]
