"""A call split over a mesh: each device computes its own batch rows, heads and part of the sequence.

The compiler cannot split a loop over tiles, nor a kernel written by hand: it would gather their operands on every
device. So such kernels run inside `jax.shard_map`, on calls as small as a device's share.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from seqattn.coordinates import Coordinates
from seqattn.kernels import cached, ring
from seqattn.kernels.call import Call, Columns, Kernel, Origin, Result, is_known
from seqattn.kernels.shifted import shifted_mask, shifted_mod

Axes = str | tuple[str, ...] | None
"""Names of mesh axes that split one dim together; None or () if it is whole."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The mesh axes over which a call of `attend` is split.

    Each device then computes its own part, and no query, key or value is gathered along batch or heads.

    - `batch` splits the batch rows (several batch dims count as one).
    - `heads` splits the query heads and, if it divides their number, the key heads. Otherwise every device keeps all
      key heads, and its query heads must read a single one of them.
    - `sequence` splits queries and keys. With as many queries as keys, blocks of keys travel from device to device
      (`ring_attend`). Otherwise the shorter side is gathered. A side that the axes do not divide stays whole.

    Arrays of masks and score modifications are whole on each device.

    Only coordinates tell where a token is, so a split sequence may be in any order, such as that of `zigzag`.

    Attributes:
        batch: axes of the batch.
        heads: axes of the heads.
        sequence: axes of the sequence.
        mesh: the mesh. Defaults to that of `jax.set_mesh`.

    Raises:
        TypeError: axes are no names, or the mesh is no mesh.

    >>> Split(batch=("data", "fsdp"), heads="tensor").heads
    'tensor'
    """

    batch: Axes = None
    heads: Axes = None
    sequence: Axes = None
    mesh: Mesh | AbstractMesh | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "sequence"):
            axes: Any = getattr(self, name)
            if not isinstance(axes, str | tuple | None) or not all(isinstance(axis, str) for axis in axes or ()):
                raise TypeError(f"{name} must be the name of a mesh axis, or a tuple of names, got {axes!r}")
        if not isinstance(self.mesh, Mesh | AbstractMesh | None):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, got {self.mesh!r}")

    @staticmethod
    def of(call: Call, given: "Split | None") -> "Split | None":
        """Returns the split of a call: that of the caller, and what the type of its queries states, or None.

        Types state the split over Explicit mesh axes.

        Raises:
            TypeError: `given` is no `Split`.
            ValueError: the axes of `given` do not fit the mesh or the call.
        """
        if given is not None:
            if not isinstance(given, Split):
                raise TypeError(f"split must be a Split, got {given!r}")
            if is_known(call.query.shape, call.key.shape) and not call.is_empty:
                _Parts.of(call, given)
        sharding = jax.typeof(call.query).sharding
        if not sharding.mesh.explicit_axes:
            return given
        batch, sequence, heads, _ = (*sharding.spec, *[None] * 4)[:4]
        if given is not None:
            named = given.batch or batch, given.heads or heads, given.sequence or sequence
            return Split(*named, given.mesh or sharding.mesh)
        typed = Split(batch, heads, sequence, sharding.mesh)
        try:
            whole = call.is_empty or _Parts.of(call, typed).whole
        except ValueError:
            # Such as grouped heads that the axis does not divide. The compiler splits what it can.
            return None
        return None if whole else typed

    def sizes(self) -> dict[str, int]:
        """Returns the number of parts of the batch, the heads and the sequence.

        Raises:
            ValueError: there is no mesh, or it lacks an axis.
        """
        shape = self.resolved().shape
        manual = set(jax.sharding.get_abstract_mesh().manual_axes)
        if taken := [name for name in self.axes() if name in manual]:
            raise ValueError(f"{self!r} names {taken[0]!r}, which a surrounding jax.shard_map has split already")
        if missing := [name for name in self.axes() if name not in shape]:
            raise ValueError(f"{self!r} names {missing[0]!r}, but the axes of the mesh are {tuple(shape)}")
        parts = {name: _names(getattr(self, name)) for name in ("batch", "heads", "sequence")}
        return {name: math.prod(shape[axis] for axis in axes) for name, axes in parts.items()}

    def axes(self) -> tuple[str, ...]:
        """Returns the names of all its axes.

        Raises:
            ValueError: two dims share an axis.
        """
        names = (*_names(self.batch), *_names(self.heads), *_names(self.sequence))
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{self!r} splits two dims over {twice[0]!r}")
        return names

    @property
    def platform(self) -> str | None:
        """The platform of the mesh, or None if it names no devices."""
        if not isinstance(self.mesh, Mesh):
            return None
        name = self.mesh.devices.flat[0].platform
        return "gpu" if name in ("cuda", "rocm") else name

    def resolved(self) -> Mesh | AbstractMesh:
        """Returns the mesh. Raises ValueError if there is none."""
        mesh = jax.sharding.get_abstract_mesh() if self.mesh is None else self.mesh
        if mesh.empty:
            raise ValueError("a Split needs a mesh: give Split(mesh=...), or call jax.set_mesh first")
        return mesh


def repeats_keys(split: Split | None) -> bool:
    """Returns whether keys that rows share are repeated: on one device such rows become queries of one row instead."""
    return isinstance(split, Split) and bool(split.batch or split.sequence)


def spread(kernel: Kernel, call: Call, split: Split, *, typed: bool = True) -> Result:
    """Runs a kernel on each device's share of a call.

    Args:
        kernel: the kernel.
        call: the whole call.
        split: the mesh axes.
        typed: False for a kernel that does not state over which mesh axes its results vary. Gradients are then also
            summed over axes that split nothing.

    Raises:
        ValueError: the split does not fit the mesh, or its axes do not divide batch or heads.
    """
    parts = _Parts.of(cached.as_if_in_rows(call), split)
    mesh = split.resolved()
    call = parts.indexed(call)
    # Arrays become operands, each with the axes that split it. All else, such as coordinates known at trace time that
    # no axis splits, stays known inside.
    named, tree = jax.tree_util.tree_flatten_with_path(call)
    leaves, specs = [x for _, x in named], [parts.spec(path, x) for path, x in named]
    given = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) or any(specs[i])]

    def share(*arrays: Array) -> Result:
        known = dict(zip(given, arrays, strict=True))
        local = jax.tree.unflatten(tree, [known.get(i, x) for i, x in enumerate(leaves)])
        return parts.compute(kernel, local)

    options: dict[str, Any] = {"in_specs": tuple(specs[i] for i in given), "out_specs": parts.results()}
    here = jax.shard_map(share, mesh=mesh, check_vma=typed, **options)
    results = _run(here, mesh, [specs[i] for i in given], [leaves[i] for i in given])
    typed_as = jax.typeof(call.query).sharding
    if not typed_as.mesh.explicit_axes:
        return results
    # The type of the output is that of the queries, also for axes that split nothing here.
    output, lse = (jax.sharding.reshard(x, NamedSharding(typed_as.mesh, P(*typed_as.spec[:3]))) for x in results)
    return output, lse


def find_in_shares(find: Callable[[Call], Any], call: Call, split: Split) -> Any:
    """Returns the tiles that each device visits, in the form in which `spread` takes them.

    Args:
        find: returns the tiles that a call visits, a pytree.
        call: the whole call, with the shapes of query, key and value in their place.
        split: the mesh axes.

    Returns:
        A pytree of arrays with one more dim in front: the parts of the batch. None if each device finds its tiles
        itself: in a ring they differ by step, and those that are known at trace time are constants of the program.
    """
    parts, mesh = _Parts.of(call, split), split.resolved()
    named, tree = jax.tree_util.tree_flatten_with_path(parts.indexed(call))
    leaves, specs = [x for _, x in named], [parts.spec(path, x) for path, x in named]
    # As in `spread`: coordinates that the axes split are known on no device.
    split_up = [isinstance(x, np.ndarray) and any(spec) for x, spec in zip(leaves, specs, strict=True)]
    given = [i for i, x in enumerate(leaves) if split_up[i] or isinstance(x, jax.Array)]
    if parts.queries or parts.keys or not given:
        return None
    shares, structure = [_share_of(x, mesh, spec) for x, spec in zip(leaves, specs, strict=True)], list[Any]()

    def share(*arrays: Array) -> list[Array]:
        known = dict(zip(given, arrays, strict=True))
        local = parts.of_device(jax.tree.unflatten(tree, [known.get(i, x) for i, x in enumerate(shares)]))
        if parts.heads and not parts.kv_heads:
            # The device's query heads read one key head.
            key, value = (jax.eval_shape(lambda x: x[:, :, :1], x) for x in (local.key, local.value))
            local = dataclasses.replace(local, key=key, value=value)
        here, found = jax.tree.flatten(find(local))
        structure.append(found)
        return [jnp.asarray(x)[None] for x in here]

    options: dict[str, Any] = {"in_specs": tuple(specs[i] for i in given), "out_specs": parts.of_visits()}
    here = jax.shard_map(share, mesh=mesh, check_vma=False, **options)
    arrays = _run(here, mesh, [specs[i] for i in given], [leaves[i] for i in given])
    return jax.tree.unflatten(structure[0], arrays)


def _run(here: Callable[..., Any], mesh: Mesh | AbstractMesh, specs: list[P], arrays: list[Any]) -> Any:
    """Runs a function of `jax.shard_map`. Outside of `jax.jit`, `reshard` does not move NumPy operands to the mesh."""

    @jax.jit
    def everywhere(*arrays: Array) -> Any:
        return here(*(_placed(x, mesh, spec) for x, spec in zip(arrays, specs, strict=True)))

    return everywhere(*arrays)


def check(call: Call, split: Split, *, rings: bool) -> None:
    """Raises an error if a call cannot be spread.

    Args:
        call: the whole call. Shapes and dtypes suffice.
        split: the mesh axes.
        rings: whether the ring replaces the kernel where a sequence is split.

    Raises:
        ValueError: as `spread`.
        NotImplementedError: the sequence is split and the kernel has no ring.
    """
    parts = _Parts.of(call, split)
    if (parts.queries or parts.keys) and not rings:
        raise NotImplementedError("it cannot split a sequence over devices; chunked can, as a ring")


@dataclasses.dataclass(frozen=True)
class _Parts:
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
    def of(call: Call, split: Split) -> "_Parts":
        """Checks the split against the sizes of a call."""
        sizes = split.sizes()
        (batch, length, num_heads, _), (_, size, num_kv_heads, _) = call.query.shape, call.key.shape
        if batch % sizes["batch"]:
            raise ValueError(f"the batch rows ({batch}) must be a multiple of {_told(split, 'batch')}")
        group, heads = num_heads // num_kv_heads, sizes["heads"]
        # A device's query heads must lie in whole groups, or within one group.
        if num_heads % heads or (num_kv_heads % heads and group % (num_heads // heads)):
            raise ValueError(
                f"{_told(split, 'heads')} must divide num_kv_heads ({num_kv_heads}), or cut each group of {group} "
                "query heads into equal parts"
            )
        queries, keys = _sequences(_names(split.sequence), sizes["sequence"], length, size)
        return _Parts(
            batch=_names(split.batch),
            heads=_names(split.heads),
            kv_heads=_names(split.heads) if num_kv_heads % heads == 0 else (),
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


def _share_of(x: Any, mesh: Mesh | AbstractMesh, spec: P) -> Any:
    """Returns a device's share of the shape of an array. All else stays as it is."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    parts = [math.prod(mesh.shape[axis] for axis in _names(axes)) for axes in (*spec, *[None] * len(x.shape))]
    return jax.ShapeDtypeStruct([n // part for n, part in zip(x.shape, parts, strict=False)], x.dtype)


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


def _placed(x: Array, mesh: Mesh | AbstractMesh, spec: P) -> Array:
    """Returns an array with the type that `jax.shard_map` requires over Explicit axes."""
    if not (explicit := mesh.explicit_axes):
        return x
    # A type names no Auto axes.
    typed = (tuple(name for name in _names(axes) if name in explicit) or None for axes in spec)
    return jax.sharding.reshard(x, NamedSharding(mesh, P(*typed)))


def _rows_alike(at: Coordinates, split: tuple[str, ...]) -> Coordinates:
    """Returns coordinates of one row where all rows are known to be alike, so that they stay known at trace time."""

    def field(x: Any) -> Any:
        alike = isinstance(x, np.ndarray) and not split and (x == x[:1]).all()
        return x[:1] if alike else x

    return jax.tree.map(field, at)


def _index(axes: tuple[str, ...]) -> Array | np.int32:
    """Returns the index of a device among the parts of a dim."""
    return lax.axis_index(axes) if axes else np.int32(0)


def _names(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _told(split: Split, name: str) -> str:
    """Names the axes of a dim with their sizes."""
    shape = split.resolved().shape
    return " x ".join(f"{axis} ({shape[axis]})" for axis in _names(getattr(split, name)))
