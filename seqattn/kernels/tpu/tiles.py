"""Tile sizes by generation of TPU."""

import dataclasses

import jax

_LANES = 128
"""TPUs compute on vectors of 8 x 128 numbers; the last dim of a block is a multiple of 128, or the whole dim."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How many queries and keys a tile has."""

    queries: int
    keys: int

    @staticmethod
    def of(length: int, size: int, head_dim: int) -> "Tiles":
        """Returns the tiles of a call with T queries, S keys and a head dim, for the TPU that it is compiled for."""
        queries, keys = _TILES.get(_generation(), _TILES[_OLDEST])[head_dim > _LANES]
        return Tiles(min(queries, _rounded(length)), min(keys, _rounded(size)))

    def padded(self, length: int, size: int) -> tuple[int, int]:
        """Returns T and S, rounded up to whole tiles."""
        return -(-length // self.queries) * self.queries, -(-size // self.keys) * self.keys


def _rounded(length: int) -> int:
    return -(-length // _LANES) * _LANES


_OLDEST = "TPU v5 lite"

# For each kind of device: queries and keys of a tile for head dims up to 128, and for larger ones. Smaller tiles leave
# out more of a window or a document, larger ones read keys less often. Which are faster has not been measured. What
# stands behind an entry is the smallest tile that the compiler refused for a causal call in bfloat16 with a head dim of
# 128, as its backward pass exceeds the memory for vectors. Up to 1,024 x 1,024 all compile. In float32 the backward
# pass of 512 x 1,024 already takes minutes to compile, as its products are exact.
_TILES = {
    "TPU v5 lite": ((512, 512), (256, 512)),  # 1,024 x 2,048
    "TPU v5": ((512, 512), (256, 512)),  # 1,024 x 2,048
    "TPU v6 lite": ((512, 512), (256, 512)),  # 2,048 x 2,048
}


def _generation() -> str:
    """Returns the kind of TPU that the program is traced for; the oldest one if that is not known."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    if device is not None:
        return str(device.device_kind)
    # Without a mesh that tells, the program is for this machine's own devices, or for a TPU that is not named.
    here = jax.devices()[0]
    return here.device_kind if here.platform == "tpu" else _OLDEST
