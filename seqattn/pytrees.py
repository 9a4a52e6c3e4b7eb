"""Frozen dataclasses as pytrees: which fields are leaves and which are static."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import jax

_Class = TypeVar("_Class", bound=type)


def pytree(cls: _Class) -> _Class:
    """A decorator that registers a frozen dataclass as a pytree.

    Fields are children, except those declared with `static()`.

    A safe replacement for `jax.tree_util.register_dataclass`. In JAX 0.10 to 0.12 the structures of two dataclasses
    registered by that function are equal if their static fields are, whatever their types. JAX can then confuse the
    types and reuse the wrong compiled function, for example that of a `Causal()` for a `SameSegment()`, and silently
    compute with the wrong mask. Register your own masks, score modifications and logits processors with `pytree`.

    Args:
        cls: a frozen dataclass.

    Returns:
        The same class.

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
    """Declares a dataclass field as static: a part of the pytree's structure instead of a leaf.

    A new value of a static field compiles a jitted function again.

    Args:
        **options: as for `dataclasses.field`, for example `default`.
    """
    return dataclasses.field(metadata={"static": True}, **options)
