"""Converts frozen dataclasses to JSON values and back, following the type annotations of their fields.

A dataclass, an enum member and a path store the name of their type: `{"type": "Rotary", "base": 500.0}`. When reading,
the name must be a member of the field's annotated union. No class needs to be registered, and no class outside the
annotations can be created.
"""

import dataclasses
import enum
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

Check = Callable[[str, Any], None]
"""Called with the path and the value of each number, and of each list before its items are read. Raises ValueError that
names the path.
"""

_EXACT = 2**53
"""Integers up to this one convert to float without loss."""


@dataclasses.dataclass(frozen=True)
class SubclassesOf:
    """In `Annotated[X, SubclassesOf(Base)]`: accepts X and any non-abstract subclass of `Base`."""

    base: type


class UnknownType(ValueError):
    """A type name that is not in the annotation of its field."""


def to_json(value: Any, annotation: Any, path: str = "config") -> Any:
    """Converts a value to JSON values.

    Args:
        value: the value; dataclasses, enums, paths, lists, tuples, numbers, strings, booleans and None.
        annotation: the type of the value.
        path: the name of the value in messages.

    Raises:
        TypeError: a value does not match its annotation, the annotation is not supported, or a class has a field named
            `type`; names the field.

    >>> import seqattn.models
    >>> to_json(seqattn.models.Learned(64), seqattn.models.Learned)
    {'type': 'Learned', 'max_length': 64}
    """
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        _check_named(kind, annotation, path)
        hints, names = _hints(kind), _names(kind)
        if "type" in names:
            raise TypeError(f"{path}: {kind.__name__} has a field named type, which stores the class: rename the field")
        return {"type": kind.__name__} | {x: to_json(getattr(value, x), hints[x], f"{path}.{x}") for x in names}
    if isinstance(value, enum.Enum):
        _check_named(kind, annotation, path)
        return {"type": kind.__name__, "value": value.value}
    if _is_path(kind) and (name := next((each.__name__ for each in _options(annotation) if _is_path(each)), None)):
        return {"type": name, "value": str(value)}
    if isinstance(value, list | tuple) and (items := _items(annotation, len(value))) is not None:
        if len(items) != len(value):
            raise TypeError(f"{path} must have {len(items)} items, got {len(value)}")
        return [to_json(x, item, f"{path}[{i}]") for i, (x, item) in enumerate(zip(value, items, strict=True))]
    # Subclasses of plain types, such as NumPy's float64, are written as the plain type.
    plain = next((of(value) for of in (bool, int, float, str) if isinstance(value, of)), value)
    try:
        return _read_plain(plain, annotation, path)
    except ValueError as error:
        raise TypeError(str(error)) from error


def from_json(value: Any, annotation: Any, path: str = "config", check: Check | None = None) -> Any:
    """Reads a value that `to_json` wrote. Safe for untrusted input: reads no deeper than the annotations nest.

    Missing fields take their defaults.

    Args:
        value: what `json.loads` returned.
        annotation: the expected type.
        path: the name of the value in messages.
        check: further rules for numbers and lists.

    Raises:
        UnknownType: the annotation has no type of this name.
        ValueError: a field is unknown, missing or mistyped, or fails `check`; names the field and the rule.

    >>> import seqattn.models
    >>> from_json({"type": "Rotary", "base": "large"}, seqattn.models.Rotary)
    Traceback (most recent call last):
    ValueError: config.base must be a number, got 'large'
    """
    if isinstance(value, Mapping):
        return _read_typed(value, annotation, path, check)
    if isinstance(value, list | tuple) and _items(annotation, 0) is not None:
        if check is not None:
            check(path, value)
        items = _items(annotation, len(value))
        if items is None or len(items) != len(value):
            raise ValueError(f"{path} must have {len(items or ())} items, got {len(value)}")
        read = [from_json(x, item, f"{path}[{i}]", check) for i, (x, item) in enumerate(zip(value, items, strict=True))]
        is_list = any(typing.get_origin(option) is list for option in _options(annotation))
        return read if is_list else tuple(read)
    plain = _read_plain(value, annotation, path)
    if check is not None and type(plain) in (int, float):
        check(path, plain)
    return plain


def shown(value: Any) -> str:
    """Formats a value for a message, truncated: input may be huge or deeply nested."""
    if value is None or isinstance(value, bool | int | float | str):
        # Python refuses to format integers of thousands of digits.
        return repr(value)[:80] if not isinstance(value, int) or abs(value) < _EXACT else "a huge integer"
    return f"a {type(value).__name__}"


def _read_plain(value: Any, annotation: Any, path: str) -> Any:
    options = _options(annotation)
    if type(value) in (bool, int, str) and type(value) in options:
        return value
    if value is None and types.NoneType in options:
        return None
    if float in options and (type(value) is float or (type(value) is int and abs(value) <= _EXACT)):
        return float(value)
    if any(type(value) is type(choice) and value == choice for option in options for choice in _choices(option)):
        return value
    _check_supported(options, path)
    raise ValueError(f"{path} must be {' or '.join(map(_described, options))}, got {shown(value)}")


def _read_typed(value: Mapping[str, Any], annotation: Any, path: str, check: Check | None) -> Any:
    kinds, name = _kinds(annotation), value.get("type")
    if not isinstance(name, str) or name not in kinds:
        _check_supported(_options(annotation), path)
        said = f"an object of type {' or '.join(kinds)}" if kinds else "no object"
        raise UnknownType(f"{path} must be {said}, got one of type {shown(name)}")
    kind = kinds[name]
    if not dataclasses.is_dataclass(kind):
        return _read_value(value, kind, path)
    made: Any = kind
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    none = dataclasses.MISSING
    needed = [x.name for x in fields.values() if x.default is none and x.default_factory is none]
    for given in value.keys() - {"type"} - fields.keys():
        raise ValueError(f"{path} has the unknown field {shown(given)}; the fields of {name} are {', '.join(fields)}")
    for missing in [field for field in needed if field not in value]:
        raise ValueError(f"{path}.{missing} is missing, and {name} has no default for it")
    hints = _hints(made)
    read = {
        field: from_json(value[field], hints[field], f"{path}.{field}", check) for field in fields if field in value
    }
    try:
        return made(**read)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_value(value: Mapping[str, Any], kind: Any, path: str) -> Any:
    """Reads a path or an enum member."""
    given = value.get("value")
    members = [member.value for member in kind] if issubclass(kind, enum.Enum) else None
    is_one = isinstance(given, str) if members is None else any(type(given) is type(x) and given == x for x in members)
    if value.keys() == {"type", "value"} and is_one:
        return kind(given)
    of = f", one of {', '.join(map(str, members))}" if members else ", a string"
    raise ValueError(f"{path} must have the fields type and value{of}")


def _check_named(kind: type, annotation: Any, path: str) -> None:
    found = _kinds(annotation).get(kind.__name__)
    if found is None:
        try:
            _check_supported(_options(annotation), path)
        except ValueError as error:
            raise TypeError(str(error)) from error
        raise TypeError(
            f"{path} cannot be a {kind.__name__}: it must be {' or '.join(_kinds(annotation)) or 'no object'}"
        )
    if found is not kind:
        raise TypeError(
            f"{path}: types are known by their names, and {kind.__name__} is both {found.__module__} and "
            f"{kind.__module__}: give one of them another name"
        )


def _options(annotation: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or the type alone, including the subclasses that an annotation accepts."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return tuple(option for member in typing.get_args(annotation) for option in _options(member))
    if origin is Annotated:
        bases = [extra.base for extra in annotation.__metadata__ if isinstance(extra, SubclassesOf)]
        # Newest first: rerunning a file or a notebook cell defines its classes again.
        return _options(annotation.__origin__) + tuple(kind for base in bases for kind in reversed([*_concrete(base)]))
    return (annotation,)


def _concrete(kind: type) -> Iterator[type]:
    child: type
    for child in kind.__subclasses__():
        if not inspect.isabstract(child):
            yield child
        yield from _concrete(child)


def _check_supported(options: Sequence[Any], path: str) -> None:
    """Raises ValueError if an annotation does not say what a value is, such as `Any` or a bare `tuple`."""
    for option in options:
        if option in (Any, object, tuple, list, dict, set, Sequence):
            raise ValueError(
                f"{path} is annotated as {option.__name__}, which does not give the types of its values: annotate the "
                "field with a precise type, such as int | None or tuple[str, ...]"
            )


def _is_path(kind: Any) -> bool:
    """Whether a class is a path. Checked by attribute, since this module imports nothing that can open a file."""
    return isinstance(kind, type) and hasattr(kind, "__fspath__")


def _kinds(annotation: Any) -> dict[str, Any]:
    """Returns the classes of an annotation by name; the first of two classes with the same name wins."""
    found: dict[str, Any] = {}
    for option in _options(annotation):
        is_named = isinstance(option, type) and (dataclasses.is_dataclass(option) or issubclass(option, enum.Enum))
        if is_named or _is_path(option):
            found.setdefault(option.__name__, option)
    return found


def _items(annotation: Any, length: int) -> tuple[Any, ...] | None:
    """Returns the annotations of a list's items, repeated to `length` if the list may have any length.

    Returns None if the annotation allows no list.
    """
    for option in _options(annotation):
        items = typing.get_args(option)
        if typing.get_origin(option) is tuple and items:
            return items[:1] * length if items[-1] is Ellipsis else items
        if typing.get_origin(option) in (list, Sequence):
            return items[:1] * length
    return None


def _choices(option: Any) -> tuple[Any, ...]:
    return typing.get_args(option) if typing.get_origin(option) is Literal else ()


def _described(option: Any) -> str:
    plain: dict[Any, str] = {types.NoneType: "null", int: "an integer", float: "a number", bool: "true or false"}
    plain[str] = "a string"
    if choices := _choices(option):
        return " or ".join(map(repr, choices))
    is_list = typing.get_origin(option) in (tuple, list, Sequence)
    return plain.get(option) or ("a list" if is_list else str(getattr(option, "__name__", option)))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.init]
