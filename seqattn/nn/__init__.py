"""Neural-network modules for `flax.nnx`. They hold parameters only: no random state and no training mode."""

from seqattn.nn.blocks import BlockConfig, DecoderBlock, EncoderBlock, Residual
from seqattn.nn.cache import Cache, PagedCache, RingCache, StaticCache
from seqattn.nn.compressed import CompressedCache, MemoryCompressedAttention
from seqattn.nn.convolution import ConvolutionalEncoder, OverBatch, OverImage, PatchEncoder
from seqattn.nn.embedding import PositionEmbedding, TokenEmbedding
from seqattn.nn.feed_forward import Activation, FeedForward
from seqattn.nn.int8 import Quantized, QuantizedEmbedding, QuantizedLinear, quantization_errors, quantized
from seqattn.nn.key_value import KeyColumns, KeyValue
from seqattn.nn.local_window import Monotonic, Predictive
from seqattn.nn.mixture import MixtureOfExperts, routings
from seqattn.nn.multi_head_attention import MultiHeadAttention, with_implementation, with_split
from seqattn.nn.normalization import BatchNorm, BatchStatistics, BatchSums, Statistic, measurements, move_statistics
from seqattn.nn.recurrent import Cell, Direction, Recurrent, RecurrentEncoder
from seqattn.nn.rotary import LinearScaling, Llama3Scaling, Rotary, RotaryScaling, YarnScaling
from seqattn.nn.routing import MixtureConfig, Routing
from seqattn.nn.scored_attention import Score, ScoredAttention

__all__ = [
    "Activation",
    "BatchNorm",
    "BatchStatistics",
    "BatchSums",
    "BlockConfig",
    "Cache",
    "Cell",
    "CompressedCache",
    "ConvolutionalEncoder",
    "DecoderBlock",
    "Direction",
    "EncoderBlock",
    "FeedForward",
    "KeyColumns",
    "KeyValue",
    "LinearScaling",
    "Llama3Scaling",
    "MemoryCompressedAttention",
    "MixtureConfig",
    "MixtureOfExperts",
    "Monotonic",
    "MultiHeadAttention",
    "OverBatch",
    "OverImage",
    "PagedCache",
    "PatchEncoder",
    "PositionEmbedding",
    "Predictive",
    "Quantized",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "Recurrent",
    "RecurrentEncoder",
    "Residual",
    "RingCache",
    "Rotary",
    "RotaryScaling",
    "Routing",
    "Score",
    "ScoredAttention",
    "StaticCache",
    "Statistic",
    "TokenEmbedding",
    "YarnScaling",
    "measurements",
    "move_statistics",
    "quantization_errors",
    "quantized",
    "routings",
    "with_implementation",
    "with_split",
]
