"""Sizes of dims: integers, or symbolic dimensions in a program that is exported for any size."""

from typing import Any

import jax
from jax import export

Size = Any
"""The size of a dim: an integer, or a symbolic dimension in a program that `jax.export` compiles for any size."""


def known_size(size: Any) -> Size:
    """Returns a size as an `int` if it is known at trace time, even as an array, and a symbolic dimension as it is."""
    return size if export.is_symbolic_dim(size) else int(size)


def may_exceed(size: Size, limit: Size) -> bool:
    """Returns whether `size > limit`, and True if the sizes are symbolic and the comparison cannot be decided.

    >>> from jax import export
    >>> (length,) = export.symbolic_shape("length")
    >>> may_exceed(3, 5), may_exceed(length, 5), may_exceed(length, length + 1)
    (False, True, False)
    """
    try:
        return bool(size > limit)
    except jax.errors.InconclusiveDimensionOperation:
        return True
