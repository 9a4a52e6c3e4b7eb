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
        trees: pytrees of arrays with the same structure, shapes and dtypes.

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
        sums = [total + _wide(leaf) for total, leaf in zip(sums, jax.tree.leaves(tree), strict=True)]
    if count == 1:
        return first
    means = [
        jnp.asarray((total / count).astype(leaf.dtype)) if _is_inexact(leaf) else leaf
        for leaf, total in zip(leaves, sums, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(first), means)


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _wide(leaf: Any) -> np.ndarray:
    """Converts to float64 or complex128, which hold every smaller float exactly."""
    return np.asarray(leaf).astype(np.complex128 if jnp.iscomplexobj(leaf) else np.float64)


def _check_same(first: Any, tree: Any) -> None:
    if jax.tree.structure(first) != jax.tree.structure(tree):  # type: ignore[operator]
        raise ValueError("trees of different structures have no mean")
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(tree), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            here, there = f"{one.dtype}{list(one.shape)}", f"{other.dtype}{list(other.shape)}"
            raise ValueError(f"{name} has no mean: it is {here} in one tree and {there} in another")
        if not _is_inexact(one) and not np.array_equal(one, other):
            raise ValueError(f"{name} has no mean: its dtype is {one.dtype} and its values differ")
