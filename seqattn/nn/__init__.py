"""Parameters around the functions: modules of flax.nnx that keep no random state and no mode."""

from seqattn.nn.attention import MultiHeadAttention
from seqattn.nn.blocks import BlockConfig, DecoderBlock, EncoderBlock, Residual
from seqattn.nn.embedding import PositionEmbedding, TokenEmbedding
from seqattn.nn.feed_forward import Activation, FeedForward
from seqattn.nn.key_value import KeyValue
from seqattn.nn.recurrent import Cell, Direction, Recurrent, RecurrentEncoder
from seqattn.nn.scored_attention import Score, ScoredAttention

__all__ = [
    "Activation",
    "BlockConfig",
    "Cell",
    "DecoderBlock",
    "Direction",
    "EncoderBlock",
    "FeedForward",
    "KeyValue",
    "MultiHeadAttention",
    "PositionEmbedding",
    "Recurrent",
    "RecurrentEncoder",
    "Residual",
    "Score",
    "ScoredAttention",
    "TokenEmbedding",
]
