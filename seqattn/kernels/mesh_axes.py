"""Along which mesh axes of a surrounding `jax.shard_map` arrays differ, and how one is made to differ along more."""

from typing import Any

import jax
from jax import lax


def varying(tree: Any, like: Any) -> Any:
    """`tree` as different on each device of a `jax.shard_map` as the leaves of `like` are together.

    A loop keeps the type of its carry there, and what is the same on all devices gets the sum of their gradients.
    """
    axes = mesh_axes(like)
    return jax.tree.map(lambda x: over(x, axes), tree)


def mesh_axes(tree: Any) -> frozenset[str]:
    """The mesh axes of a surrounding `jax.shard_map` over which some leaf of the tree varies."""
    traced = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.core.Tracer))
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in traced))


def over(x: Any, axes: frozenset[str]) -> Any:
    """`x` as different along the mesh axes `axes`, too."""
    missing = axes - mesh_axes(x)
    return lax.pcast(x, tuple(missing), to="varying") if missing else x
