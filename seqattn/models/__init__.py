"""Models: each has a frozen config and methods to encode, decode and step."""

from seqattn.models.attention_encoder import AttentionEncoder
from seqattn.models.captioner import Captioner, CaptionerConfig, Convolutional, Patches
from seqattn.models.encoder import Encoder, EncoderConfig, MaskedTokens, Pooling, TextLabels, TokenLabels, TokenVectors
from seqattn.models.encoder_decoder import EncoderDecoder
from seqattn.models.language_model import (
    LanguageModel,
    LanguageModelConfig,
    LanguageModelMemory,
    LanguageModelState,
)
from seqattn.models.position_encodings import (
    BucketBiases,
    Learned,
    LinearBiases,
    Positions,
    RelativeKeys,
    Rotary,
    Sinusoidal,
)
from seqattn.models.recurrent_language_model import (
    RecurrentLanguageModel,
    RecurrentLanguageModelConfig,
    RecurrentLanguageModelState,
)
from seqattn.models.seq2seq import Seq2Seq, Seq2SeqConfig, Seq2SeqMemory, Seq2SeqState
from seqattn.models.stack import Attention, Compressed, Full, Local, Stack, Window
from seqattn.models.transformer import Transformer, TransformerConfig, TransformerMemory, TransformerState

__all__ = [
    "Attention",
    "AttentionEncoder",
    "BucketBiases",
    "Captioner",
    "CaptionerConfig",
    "Compressed",
    "Convolutional",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "Full",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelMemory",
    "LanguageModelState",
    "Learned",
    "LinearBiases",
    "Local",
    "MaskedTokens",
    "Patches",
    "Pooling",
    "Positions",
    "RecurrentLanguageModel",
    "RecurrentLanguageModelConfig",
    "RecurrentLanguageModelState",
    "RelativeKeys",
    "Rotary",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Seq2SeqMemory",
    "Seq2SeqState",
    "Sinusoidal",
    "Stack",
    "TextLabels",
    "TokenLabels",
    "TokenVectors",
    "Transformer",
    "TransformerConfig",
    "TransformerMemory",
    "TransformerState",
    "Window",
]
