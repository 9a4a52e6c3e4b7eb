"""Models: a frozen config each, and a module that encodes, decodes and steps."""

from seqattn.models.encoder_decoder import EncoderDecoder
from seqattn.models.seq2seq import Seq2Seq, Seq2SeqConfig, Seq2SeqMemory, Seq2SeqState
from seqattn.models.transformer import (
    Learned,
    Rotary,
    Sinusoidal,
    Transformer,
    TransformerConfig,
    TransformerMemory,
    TransformerState,
)

__all__ = [
    "EncoderDecoder",
    "Learned",
    "Rotary",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Seq2SeqMemory",
    "Seq2SeqState",
    "Sinusoidal",
    "Transformer",
    "TransformerConfig",
    "TransformerMemory",
    "TransformerState",
]
