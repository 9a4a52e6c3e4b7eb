"""The block masks of a model: layers with equal masks share the tiles that these reach."""

import dataclasses
from collections.abc import Iterable

from jaxtyping import Array, Float

from seqattn.coordinates import Coordinates
from seqattn.kernels.block_mask import BlockMask
from seqattn.mask import Mask
from seqattn.nn.multi_head_attention import MultiHeadAttention
from seqattn.score_mod import ScoreMod


@dataclasses.dataclass(frozen=True)
class BlockMasks:
    """A block mask for each mask that several layers have.

    Attributes:
        found: the block masks by the class of an attention and its mask.
    """

    found: dict[tuple[type, Mask | None], BlockMask | None]

    @staticmethod
    def of(
        layers: Iterable[tuple[MultiHeadAttention, ScoreMod | None]],
        x: Float[Array, "*batch T D"],
        at: Coordinates,
        kv_at: Coordinates | None = None,
    ) -> "BlockMasks":
        """Finds the tiles of each mask once.

        Args:
            layers: the attention of each layer, whose mask holds no arrays, with its score modification.
            x: tokens `[*batch, T, D]`, of which only shape and dtype are read.
            at: their coordinates.
            kv_at: the coordinates of the keys. Defaults to `at`.
        """
        layers, found = list(layers), dict[tuple[type, Mask | None], BlockMask | None]()
        kinds = [_kind(attention) for attention, _ in layers]
        for kind, (attention, score_mod) in zip(kinds, layers, strict=True):
            # A list that only one layer reads is made where it is read.
            if kind not in found and kinds.count(kind) > 1:
                found[kind] = attention.block_mask(x, at, kv_at, score_mod=score_mod)
        return BlockMasks(found)

    def get(self, attention: MultiHeadAttention) -> BlockMask | None:
        """Returns the block mask of a layer, or None if it shares none."""
        return self.found.get(_kind(attention))


def _kind(attention: MultiHeadAttention) -> tuple[type, Mask | None]:
    """Returns what layers that visit the same tiles have in common. The keys of a compressed layer are not tokens."""
    return type(attention), attention.mask
