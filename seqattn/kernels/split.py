"""A call split over a mesh: each device computes its own batch rows, heads and part of the sequence.

The compiler cannot split a loop over tiles, nor a kernel written by hand: it would gather their operands on every
device. So such kernels run inside `jax.shard_map`, on calls as small as a device's share.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from seqattn.kernels import cached
from seqattn.kernels.call import Call, Kernel, Result, is_known
from seqattn.kernels.parts import Parts

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
                given.parts(call)
        sharding = jax.typeof(call.query).sharding
        if not sharding.mesh.explicit_axes:
            return given
        batch, sequence, heads, _ = (*sharding.spec, *[None] * 4)[:4]
        if given is not None:
            named = given.batch or batch, given.heads or heads, given.sequence or sequence
            return Split(*named, given.mesh or sharding.mesh)
        typed = Split(batch, heads, sequence, sharding.mesh)
        try:
            whole = call.is_empty or typed.parts(call).whole
        except ValueError:
            # Such as grouped heads that the axis does not divide. The compiler splits what it can.
            return None
        return None if whole else typed

    def parts(self, call: Call) -> Parts:
        """Returns the parts of a call, of which shapes and dtypes suffice.

        Raises:
            ValueError: there is no mesh, it lacks an axis, or the axes do not divide the batch or the heads.
        """
        shape, names = self.resolved().shape, self.axes()
        manual = set(jax.sharding.get_abstract_mesh().manual_axes)
        if taken := [name for name in names if name in manual]:
            raise ValueError(f"{self!r} names {taken[0]!r}, which a surrounding jax.shard_map has split already")
        if missing := [name for name in names if name not in shape]:
            raise ValueError(f"{self!r} names {missing[0]!r}, but the axes of the mesh are {tuple(shape)}")
        dims = {dim: _names(getattr(self, dim)) for dim in ("batch", "heads", "sequence")}
        return Parts.of(call, {dim: {axis: shape[axis] for axis in axes} for dim, axes in dims.items()})

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
    parts = split.parts(cached.as_if_in_rows(call))
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
    parts, mesh = split.parts(call), split.resolved()
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
    parts = split.parts(call)
    if (parts.queries or parts.keys) and not rings:
        raise NotImplementedError("it cannot split a sequence over devices; chunked can, as a ring")


def _share_of(x: Any, mesh: Mesh | AbstractMesh, spec: P) -> Any:
    """Returns a device's share of the shape of an array. All else stays as it is."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    parts = [math.prod(mesh.shape[axis] for axis in _names(axes)) for axes in (*spec, *[None] * len(x.shape))]
    return jax.ShapeDtypeStruct([n // part for n, part in zip(x.shape, parts, strict=False)], x.dtype)


def _placed(x: Array, mesh: Mesh | AbstractMesh, spec: P) -> Array:
    """Returns an array with the type that `jax.shard_map` requires over Explicit axes."""
    if not (explicit := mesh.explicit_axes):
        return x
    # A type names no Auto axes.
    typed = (tuple(name for name in _names(axes) if name in explicit) or None for axes in spec)
    return jax.sharding.reshard(x, NamedSharding(mesh, P(*typed)))


def _names(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
