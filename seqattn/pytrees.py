"""Frozen dataclasses as pytrees: which fields are leaves, and which are static, compiled in."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import jax

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
