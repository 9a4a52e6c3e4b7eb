"""Where the parameters of a model lie, and the rows of a batch beside them: evaluation and decoding on a mesh.

The parameters alone decide. Those of a mesh stay there, sharded, and the rows of a batch are split as in training.
"""

import dataclasses
import math
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqattn.kernels.split import Split
from seqattn.nn import with_split
from train.devices.sharding import ROWS, one_at_a_time, put, whole_over
from train.update.parameters import matching

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The devices of a model's parameters. Hashable, so that a compiled function may be cached for it.

    Attributes:
        shardings: the sharding of each parameter, in the order of the leaves; empty if all lie on one device.
    """

    shardings: tuple[NamedSharding, ...] = ()

    @classmethod
    def of(cls, params: Any) -> "Layout":
        """Returns the layout of the parameters of a model, or of any arrays in it."""
        leaves = jax.tree.leaves(params)
        places: tuple[Any, ...] = tuple(getattr(leaf, "sharding", None) for leaf in leaves)
        split = all(isinstance(place, NamedSharding) and set(ROWS) <= {*place.mesh.shape} for place in places)
        return cls(places) if places and split else cls()

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the parameters; None on one device."""
        mesh: Any = self.shardings[0].mesh if self.shardings else None
        return mesh

    @property
    def parts(self) -> int:
        """The number of parts of the rows of a batch. The number of rows must be a multiple of it."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in ROWS)

    def split(self, rows: Tree) -> Tree:
        """Puts arrays `[B, ...]` beside the parameters, with their rows split. Every process gives all rows."""
        if self.mesh is None:
            return rows
        place = NamedSharding(self.mesh, P(ROWS))
        return jax.tree.map(lambda array: put(array, place), rows)

    def copied(self, tree: Tree) -> Tree:
        """Puts arrays beside the parameters, whole on every device. Every process gives the same values."""
        if self.mesh is None:
            return tree
        place, kinds = NamedSharding(self.mesh, P()), (jax.Array, np.ndarray, np.generic)
        # A Python number has no dtype of its own, and must keep that.
        return jax.tree.map(lambda leaf: put(leaf, place) if isinstance(leaf, kinds) else leaf, tree)

    def waited(self, made: Tree) -> Tree:
        """Waits for what was computed on a mesh of CPU devices; see `one_at_a_time`."""
        return one_at_a_time(self.mesh is not None, made)

    def gathered(self, params: Tree, pattern: str) -> Tree:
        """Inside a compiled function: makes parameters whole over `fsdp`, each while it is used.

        Args:
            params: the parameters.
            pattern: the paths of those to gather, as in `train.update.parameters.matching`; see `to_gather`. A step of
                decoding has few activations, so that it is best to gather only `TABLES`.
        """
        if self.mesh is None:
            return params
        leaves, structure = jax.tree.flatten(params)
        chosen, whole = jax.tree.leaves(matching(params, [pattern])), whole_over("fsdp", self.shardings)
        gathered = [
            jax.lax.with_sharding_constraint(leaf, place) if each else leaf
            for leaf, each, place in zip(leaves, chosen, whole, strict=True)
        ]
        return jax.tree.unflatten(structure, gathered)

    def merged(self, graph: nnx.GraphDef, params: Any, pattern: str | None = None) -> Any:
        """Inside a compiled function: merges a model whose attention each device computes for its own rows and heads.

        Args:
            graph: the model's structure.
            params: its parameters.
            pattern: the parameters to gather; by default those of `to_gather`.
        """
        if pattern is None:
            pattern = to_gather(params, scanned=is_scanned(nnx.merge(graph, params)))
        model = nnx.merge(graph, self.gathered(params, pattern))
        return model if self.mesh is None else with_split(model, Split(ROWS, "tensor", mesh=self.mesh))


TABLES = "*table"
"""The paths of embedding tables, which cannot be looked up in parts."""
_AT_ONCE = 2**30
"""Bytes of parameters up to which the layers of a scan are gathered over `fsdp` all at once."""


def to_gather(params: Any, *, scanned: bool) -> str:
    """Returns the paths of the parameters to gather over `fsdp` before a model reads whole texts.

    If they stay in parts, the compiler may gather the activations of all rows in place of the parameters. But layers in
    a scan would all be gathered before it. A large model leaves them to the compiler, which gathers each in its turn.

    Args:
        params: the parameters of the model, of arrays or shapes.
        scanned: whether its layers are in a scan.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return TABLES if scanned and size > _AT_ONCE else "*"


def is_scanned(model: Any) -> bool:
    """Whether the layers of a model are in a scan."""
    return bool(getattr(getattr(getattr(model, "config", None), "block", None), "scan_layers", False))


def fetch(tree: Any) -> Any:
    """Copies arrays to the host, as NumPy arrays. All processes must call it if the arrays are spread over them."""

    def one(array: Any) -> np.ndarray:
        if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(one, tree)
