"""Sizes of dims: integers, and what stands for them in a program that is exported for any size."""

from typing import Any

import jax
from jax import export

Size = Any
"""The size of a dim: an integer, or what stands for one in a program that `jax.export` compiles for any size."""


def known_size(size: Any) -> Size:
    """A size that is known at trace time as an `int`, be it an array; a symbolic dimension of `jax.export` as it is."""
    return size if export.is_symbolic_dim(size) else int(size)


def may_exceed(size: Size, limit: Size) -> bool:
    """Whether `size > limit`, and True where they are symbolic dimensions of `jax.export` that leave it open.

    >>> from jax import export
    >>> (length,) = export.symbolic_shape("length")
    >>> may_exceed(3, 5), may_exceed(length, 5), may_exceed(length, length + 1)
    (False, True, False)
    """
    try:
        return bool(size > limit)
    except jax.errors.InconclusiveDimensionOperation:
        return True
