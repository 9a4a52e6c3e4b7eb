"""Attention for JAX: token positions are data, masks are predicates, and every kernel honors one contract.

Start with `attend`. `Coordinates` hold the positions of tokens, a `Mask` decides which keys a query sees, a `ScoreMod`
modifies scores, and `explain` tells which kernel runs. `seqattn.nn` holds Flax modules, `seqattn.models` whole models
and `seqattn.decoding` sampling and beam search.
"""

from seqattn import decoding, models, nn, scores
from seqattn.attention import attend, attend_scores, attention_weights
from seqattn.block_mask import block_mask
from seqattn.coordinates import Coordinates, Tile
from seqattn.drop_in import dot_product_attention
from seqattn.dropout import Dropout
from seqattn.kernels.block_mask import BlockMask
from seqattn.kernels.dispatch import Explanation, explain
from seqattn.kernels.split import Split
from seqattn.losses import cross_entropy
from seqattn.mask import Mask, MaskMod, Reach
from seqattn.masks import Causal, Dilated, Neighborhood, NotPadding, Prefix, SameBlock, SameSegment, SlidingWindow
from seqattn.positions import angular_frequencies, rotate, sinusoidal
from seqattn.pytrees import pytree, static
from seqattn.ring_attention import RingCost, ring_attend, ring_cost, zigzag
from seqattn.score_mod import ScoreFunction, ScoreMod, compose
from seqattn.score_mods import Alibi, RelativeBuckets, RelativePositions, SoftCap

__all__ = [
    "Alibi",
    "BlockMask",
    "Causal",
    "Coordinates",
    "Dilated",
    "Dropout",
    "Explanation",
    "Mask",
    "MaskMod",
    "Neighborhood",
    "NotPadding",
    "Prefix",
    "Reach",
    "RelativeBuckets",
    "RelativePositions",
    "RingCost",
    "SameBlock",
    "SameSegment",
    "ScoreFunction",
    "ScoreMod",
    "SlidingWindow",
    "SoftCap",
    "Split",
    "Tile",
    "angular_frequencies",
    "attend",
    "attend_scores",
    "attention_weights",
    "block_mask",
    "compose",
    "cross_entropy",
    "decoding",
    "dot_product_attention",
    "explain",
    "models",
    "nn",
    "pytree",
    "ring_attend",
    "ring_cost",
    "rotate",
    "scores",
    "sinusoidal",
    "static",
    "zigzag",
]
