"""Frozen dataclasses as pytrees: which fields are leaves, and which are static, sizes that are compiled in."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import numpy as np
from jax import export

Size = Any
"""The size of a dim: an integer, or what stands for one in a program that `jax.export` compiles for any size."""

_Class = TypeVar("_Class", bound=type)


def pytree(cls: _Class) -> _Class:
    """Registers a frozen dataclass as a pytree, as a decorator: each field is a child, but for those of `static()`.

    What `jax.tree_util.register_dataclass` is for, but safe under `jax.jit`: to JAX 0.10 to 0.12 the structures of two
    dataclasses registered by that are equal where their static fields are, whatever their types, so that a compiled
    function now and then takes one for the other, a `Causal()` for a `SameSegment()`, and silently computes with the
    wrong one. Register your own masks, score modifications and logits processors with this, too.

    >>> @pytree
    ... @dataclasses.dataclass(frozen=True)
    ... class Scaled:
    ...     by: jax.Array
    ...     times: int = static(default=1)
    >>> jax.tree.structure(Scaled(2.0, times=3))
    PyTreeDef(CustomNode(Scaled[(3,)], [*]))
    """
    fields = [field for field in dataclasses.fields(cls) if field.init]
    meta = tuple(field.name for field in fields if field.metadata.get("static", False))
    data = tuple(field.name for field in fields if field.name not in meta)
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in data)

    def flatten(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(node, name) for name in data), tuple(getattr(node, name) for name in meta)

    def flatten_with_keys(node: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        children, settings = flatten(node)
        return tuple(zip(keys, children, strict=True)), settings

    def unflatten(settings: tuple[Any, ...], children: Iterable[Any]) -> Any:
        return cls(**dict(zip(data, children, strict=True)), **dict(zip(meta, settings, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def static(**options: Any) -> Any:
    """A field that is no leaf of its dataclass but part of its structure; `options` are as of `dataclasses.field`."""
    return dataclasses.field(metadata={"static": True}, **options)


def check_integer(name: str, value: int | np.integer, minimum: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `minimum`.

    >>> check_integer("num_heads", 0, minimum=1)
    Traceback (most recent call last):
    ValueError: num_heads (0) must be an integer of at least 1
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} ({value!r}) must be an integer of at least {minimum}")


def check_sizes(**sizes: int) -> None:
    """Raises ValueError unless every size is an integer of at least 1.

    >>> check_sizes(model_dim=4, num_heads=0)
    Traceback (most recent call last):
    ValueError: num_heads (0) must be an integer of at least 1
    """
    for name, value in sizes.items():
        check_integer(name, value, minimum=1)


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
