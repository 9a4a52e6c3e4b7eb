"""Attention for JAX: coordinates say where tokens are, masks who may look, kernels how it is computed."""

from seqattn import decoding, models, nn, scores
from seqattn.attention import attend, attend_scores, attention_weights, dot_product_attention
from seqattn.coordinates import Coordinates, Tile
from seqattn.dropout import Dropout
from seqattn.losses import cross_entropy
from seqattn.masks import (
    Causal,
    Dilated,
    Mask,
    MaskMod,
    NotPadding,
    Prefix,
    Reach,
    SameSegment,
    SlidingWindow,
)
from seqattn.positions import angular_frequencies, rotate, sinusoidal

__all__ = [
    "Causal",
    "Coordinates",
    "Dilated",
    "Dropout",
    "Mask",
    "MaskMod",
    "NotPadding",
    "Prefix",
    "Reach",
    "SameSegment",
    "SlidingWindow",
    "Tile",
    "angular_frequencies",
    "attend",
    "attend_scores",
    "attention_weights",
    "cross_entropy",
    "decoding",
    "dot_product_attention",
    "models",
    "nn",
    "rotate",
    "scores",
    "sinusoidal",
]
