"""Checkpoint averaging: the mean of the parameters of the last few checkpoints.

Source: Vaswani et al. 2017, "Attention is all you need", section 6.1 (5 checkpoints for base models, 20 for big ones).
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def average(trees: Iterable[Any]) -> Any:
    """Computes the mean of parameter trees, leaf by leaf.

    Sums are kept in float64, the result has the dtypes of the leaves. If the trees come from a generator, only one tree
    and the sums are in memory at a time. A single tree is returned unchanged.

    >>> average([{"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.array([2.0, 4.0])}])
    {'kernel': Array([1.5, 3. ], dtype=float32)}

    Args:
        trees: pytrees of arrays with the same structure, shapes, dtypes and shardings. Sharded arrays are averaged part
            by part.

    Returns:
        A pytree of the same structure, shapes and dtypes.

    Raises:
        ValueError: there is no tree; the trees differ in structure, shape or dtype; or an integer leaf, which has no
            mean, differs between them.
    """
    rest = iter(trees)
    first = next(rest, None)
    if first is None:
        raise ValueError("there is no tree to average")
    leaves, count = jax.tree.leaves(first), 1
    sums = [_wide(leaf) for leaf in leaves]
    for count, tree in enumerate(rest, 2):  # noqa: B007
        _check_same(first, tree)
        sums = [
            [total + part for total, part in zip(totals, _wide(leaf), strict=True)]
            for totals, leaf in zip(sums, jax.tree.leaves(tree), strict=True)
        ]
    if count == 1:
        return first
    means = [
        _joined(leaf, [(total / count).astype(leaf.dtype) for total in totals]) if _is_inexact(leaf) else leaf
        for leaf, totals in zip(leaves, sums, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(first), means)


def _parts(leaf: Any) -> list[np.ndarray]:
    """The parts of an array that this process holds, one for each device."""
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        return [np.asarray(shard.data) for shard in leaf.addressable_shards]
    return [np.asarray(leaf)]


def _joined(like: Any, parts: list[np.ndarray]) -> jax.Array:
    """The array whose parts these are, on the devices of another one."""
    if not (isinstance(like, jax.Array) and len(like.sharding.device_set) > 1):
        return jnp.asarray(parts[0])
    devices = [shard.device for shard in like.addressable_shards]
    placed = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, placed)


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _wide(leaf: Any) -> list[np.ndarray]:
    """Converts the parts to float64 or complex128, which hold every smaller float exactly."""
    dtype = np.complex128 if jnp.iscomplexobj(leaf) else np.float64
    return [part.astype(dtype) for part in _parts(leaf)]


def _check_same(first: Any, tree: Any) -> None:
    if jax.tree.structure(first) != jax.tree.structure(tree):  # type: ignore[operator]
        raise ValueError("trees of different structures have no mean")
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(tree), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            here, there = f"{one.dtype}{list(one.shape)}", f"{other.dtype}{list(other.shape)}"
            raise ValueError(f"{name} has no mean: it is {here} in one tree and {there} in another")
        if not _is_inexact(one) and not all(map(np.array_equal, _parts(one), _parts(other))):
            raise ValueError(f"{name} has no mean: its dtype is {one.dtype} and its values differ")
