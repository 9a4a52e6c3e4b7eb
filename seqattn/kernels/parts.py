"""The parts of a call that is split over a mesh: which axes split each array, and what one device computes of it."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from seqattn.coordinates import Coordinates
from seqattn.kernels import cached, ring
from seqattn.kernels.call import Call, Columns, Kernel, Origin, Result
from seqattn.kernels.shifted import shifted_mask, shifted_mod


@dataclasses.dataclass(frozen=True)
class Parts:
    """How the dims of a call are split.

    Attributes:
        batch: the axes of the batch.
        heads: the axes of the query heads.
        kv_heads: the axes of the key heads, none if each device keeps all of them.
        queries: the axes of the queries, none if they are gathered.
        keys: the axes of the keys, none if they are gathered.
        whole: True if there is only one part.
        length: T of the whole call.
        num_heads: N of the whole call.
        group: N / K.
    """

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    whole: bool
    length: int
    num_heads: int
    group: int

    @staticmethod
    def of(call: Call, axes: Mapping[str, Mapping[str, int]]) -> "Parts":
        """Checks the axes of a `Split` against the sizes of a call.

        Args:
            call: the whole call. Shapes and dtypes suffice.
            axes: the mesh axes that split "batch", "heads" and "sequence", with their sizes.

        Raises:
            ValueError: the axes do not divide the batch or the heads.
        """
        names = {dim: tuple(given) for dim, given in axes.items()}
        sizes = {dim: math.prod(given.values()) for dim, given in axes.items()}
        told = {dim: " x ".join(f"{axis} ({n})" for axis, n in given.items()) for dim, given in axes.items()}
        (batch, length, num_heads, _), (_, size, num_kv_heads, _) = call.query.shape, call.key.shape
        if batch % sizes["batch"]:
            raise ValueError(f"the batch rows ({batch}) must be a multiple of {told['batch']}")
        group, heads = num_heads // num_kv_heads, sizes["heads"]
        # A device's query heads must lie in whole groups, or within one group.
        if num_heads % heads or (num_kv_heads % heads and group % (num_heads // heads)):
            raise ValueError(
                f"{told['heads']} must divide num_kv_heads ({num_kv_heads}), or cut each group of {group} query heads "
                "into equal parts"
            )
        queries, keys = _sequences(names["sequence"], sizes["sequence"], length, size)
        return Parts(
            batch=names["batch"],
            heads=names["heads"],
            kv_heads=names["heads"] if num_kv_heads % heads == 0 else (),
            queries=queries,
            keys=keys,
            whole=max(sizes["batch"], heads) == 1 and not (queries or keys),
            length=length,
            num_heads=num_heads,
            group=group,
        )

    def indexed(self, call: Call) -> Call:
        """Returns the call with coordinates in the form in which they are split."""
        return dataclasses.replace(
            call,
            q_at=_rows_alike(call.q_at, self.queries),
            kv_at=_rows_alike(call.kv_at, self.keys),
        )

    def spec(self, path: tuple[Any, ...], leaf: Any) -> P:
        """Returns the mesh axes of a leaf of the call, from its path in the call."""
        name = path[0].name
        if name in ("query", "rows"):
            return self._axes(self.batch, self.queries, self.heads)
        if name in ("key", "value"):
            return self._axes(self.batch, self.keys, self.kv_heads)
        if name == "columns":
            # A cache has heads before tokens. The marks `finite` may serve all heads.
            heads = () if path[1].name == "finite" and leaf.ndim == 2 else self.kv_heads
            return self._axes(self.batch, heads)
        if name in ("q_at", "kv_at"):
            return self._axes(self.batch if leaf.shape[0] > 1 else (), self.queries if name == "q_at" else self.keys)
        # A longer path leads to an array inside a `Mask`.
        if name in ("mask", "bias") and len(path) == 1:
            # In a ring a device needs the columns of all keys, in the order of the devices.
            dims = (self.batch, self.heads, self.queries, () if self.queries else self.keys)
            return self._axes(*(axes if n > 1 else () for n, axes in zip(leaf.shape, dims, strict=True)))
        if name == "visits":
            return self.of_visits()
        # Arrays of masks and score modifications, the scale and the key of dropout are whole on each device.
        return P()

    @staticmethod
    def _axes(*dims: tuple[str, ...]) -> P:
        return P(*(axes or None for axes in dims))

    def of_visits(self) -> P:
        """Returns the mesh axes of the lists of tiles, which have a part of the batch in front."""
        return self._axes(self.batch)

    def results(self) -> tuple[P, P]:
        """Returns the mesh axes of the output and the log-sum-exp."""
        each = self._axes(self.batch, self.queries, self.heads)
        return each, each

    def compute(self, kernel: Kernel, call: Call) -> Result:
        """Computes a device's share, inside `jax.shard_map`."""
        visits = None if self.queries or self.keys else jax.tree.map(lambda x: x[0], call.visits)
        call = self.of_device(dataclasses.replace(call, visits=visits))
        call = dataclasses.replace(call, score_mod=shifted_mod(call, call.origin))
        if self.heads and not self.kv_heads:
            # The device's query heads lie in one group, which reads one key head.
            call = _with_key_head(call, call.origin.head // self.group)
        if self.queries and self.keys:
            return ring.attend(call, self.keys)
        output, lse = kernel(call)
        return _merged(output, lse, self.keys) if self.keys else (output, lse)

    def of_device(self, call: Call) -> Call:
        """Returns a device's share, whose mask knows where it begins in the whole call, inside `jax.shard_map`."""
        rows, own, heads, _ = call.query.shape
        origin = Origin(
            batch=_index(self.batch) * rows,
            head=_index(self.heads) * heads,
            query=_index(self.queries) * own,
            key=_index(self.keys) * cached.as_if_in_rows(call).key.shape[1],
            num_heads=self.num_heads,
            length=self.length,
        )
        parts = lax.axis_size(self.batch) if self.batch else 1
        return dataclasses.replace(call, origin=origin, mask=shifted_mask(call, origin, parts))


def _with_key_head(call: Call, head: Array) -> Call:
    """Returns a call with one of its key heads."""
    one = functools.partial(lax.dynamic_slice_in_dim, start_index=head, slice_size=1)
    if (columns := call.columns) is None:
        return dataclasses.replace(call, key=one(call.key, axis=2), value=one(call.value, axis=2))
    finite = columns.finite if columns.finite.ndim == 2 else one(columns.finite, axis=1)
    return dataclasses.replace(call, columns=Columns(one(columns.key, axis=1), one(columns.value, axis=1), finite))


def _sequences(axes: tuple[str, ...], parts: int, length: int, size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the axes that split the queries and the keys."""
    if parts == 1:
        return (), ()
    # As many queries as keys: a ring, whose memory is that of one block.
    if length == size:
        return (axes, axes) if length % parts == 0 else ((), ())
    # Otherwise the shorter side is gathered; a side that the axes do not divide cannot be split.
    if size < length:
        return (axes if length % parts == 0 else ()), ()
    return (), (axes if size % parts == 0 else ())


def _merged(output: Array, lse: Array, axes: tuple[str, ...]) -> Result:
    """Merges the results of devices that hold different keys: softmaxes over parts, weighted by their totals."""
    # The largest total is subtracted before exp. It cancels, so it needs no gradient.
    peak = lax.pmax(lax.stop_gradient(lse), axes)
    share = jnp.exp(lse - peak)
    total = lax.psum(share, axes)
    merged = lax.psum(output.astype(lse.dtype) * share[..., None], axes) / total[..., None]
    # A row that no device can see has the lowest number everywhere, and adding log(n) to it changes nothing.
    return merged.astype(output.dtype), peak + jnp.log(total)


def _rows_alike(at: Coordinates, split: tuple[str, ...]) -> Coordinates:
    """Returns coordinates of one row where all rows are known to be alike, so that they stay known at trace time."""

    def field(x: Any) -> Any:
        alike = isinstance(x, np.ndarray) and not split and (x == x[:1]).all()
        return x[:1] if alike else x

    return jax.tree.map(field, at)


def _index(axes: tuple[str, ...]) -> Array | np.int32:
    """Returns the index of a device among the parts of a dim."""
    return lax.axis_index(axes) if axes else np.int32(0)
