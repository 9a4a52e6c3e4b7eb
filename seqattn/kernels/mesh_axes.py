"""The mesh axes of a surrounding `jax.shard_map` over which arrays vary, and how to make an array vary over more."""

from typing import Any

import jax
from jax import lax


def varying(tree: Any, like: Any) -> Any:
    """Returns `tree` with leaves that vary over all mesh axes over which some leaf of `like` varies.

    A loop requires that its carry keeps this type. The transpose of the cast sums the gradients over those axes.
    """
    axes = mesh_axes(like)
    return jax.tree.map(lambda x: over(x, axes), tree)


def mesh_axes(tree: Any) -> frozenset[str]:
    """Returns the mesh axes of a surrounding `jax.shard_map` over which some leaf of the tree varies."""
    # Only traced values can vary: a concrete array is the same on all devices.
    traced = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.core.Tracer))
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in traced))


def over(x: Any, axes: frozenset[str]) -> Any:
    """Returns `x`, which also varies over the mesh axes `axes`."""
    # `lax.pcast` refuses axes over which the array already varies.
    missing = axes - mesh_axes(x)
    return lax.pcast(x, tuple(missing), to="varying") if missing else x
