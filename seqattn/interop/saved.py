"""Any model as plain values and named arrays, to be saved in any format, and back: for files that strangers made, too.

A config is a tree of JSON values, in which dataclasses and enums carry the name of their type. Parameters are arrays
by dotted paths, such as `encoder.0.attention.query.kernel`; a table that two uses share is one array.
"""

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from seqattn.models.captioner import Captioner, CaptionerConfig
from seqattn.models.encoder import Encoder, EncoderConfig
from seqattn.models.language_model import LanguageModel, LanguageModelConfig
from seqattn.models.recurrent_language_model import RecurrentLanguageModel, RecurrentLanguageModelConfig
from seqattn.models.seq2seq import Seq2Seq, Seq2SeqConfig
from seqattn.models.transformer import Transformer, TransformerConfig

ModelConfig = (
    CaptionerConfig
    | EncoderConfig
    | LanguageModelConfig
    | RecurrentLanguageModelConfig
    | Seq2SeqConfig
    | TransformerConfig
)
"""The config of any model."""

_MODELS: dict[type, type] = {
    CaptionerConfig: Captioner,
    EncoderConfig: Encoder,
    LanguageModelConfig: LanguageModel,
    RecurrentLanguageModelConfig: RecurrentLanguageModel,
    Seq2SeqConfig: Seq2Seq,
    TransformerConfig: Transformer,
}

_LARGEST = 2**31 - 1
_MOST_LAYERS = 256
"""And most items of a list; the shapes alone of so many take seconds."""
_LAYERS = ("num_layers", "num_encoder_layers", "num_decoder_layers")
_MAY_BE_ZERO = (*_LAYERS, "vocab_size", "radius")
_EXACT = 2**53
"""Integers up to here are floats without loss."""
_MOST_SHOWN = 12


def model_type(config: ModelConfig) -> type:
    """The class of the models of a config.

    >>> model_type(TransformerConfig(11)).__name__
    'Transformer'
    """
    return _MODELS[type(config)]


def to_dict(config: ModelConfig) -> dict[str, Any]:
    """A model's config as JSON values.

    Raises:
        ValueError: it is of a type or holds a value that `from_dict` would refuse.

    >>> from seqattn.models import Rotary
    >>> values = to_dict(LanguageModelConfig(11, num_layers=1, positions=Rotary(base=500.0)))
    >>> values["type"], values["positions"], values["block"]["activation"]
    ('LanguageModelConfig', {'type': 'Rotary', 'base': 500.0}, {'type': 'Activation', 'value': 'relu'})
    """
    values = _written(config)
    if _read(values, ModelConfig, "config") != config:
        raise ValueError("config must be made of the types of seqattn.models alone: it would be read as another one")
    return values


def from_dict(values: Any, *, max_parameters: int = 1_000_000_000) -> ModelConfig:
    """The config that `to_dict` wrote, where a model can be made of it: the values may come from anywhere.

    A field that is left out takes its default. Nothing of the size of the model is allocated.

    Args:
        values: what `json.loads` gives.
        max_parameters: most parameters that a model of this config may have.

    Raises:
        ValueError: naming the field and the rule: an unknown, missing or mistyped field, a number that is not finite
            or out of its range, more than 256 layers, sizes that do not fit each other, or too many parameters.

    >>> from_dict({"type": "Seq2SeqConfig", "vocab_size": 11, "num_layers": True})
    Traceback (most recent call last):
    ValueError: config.num_layers must be an integer, got True
    """
    config: ModelConfig = _read(values, ModelConfig, "config")
    leaves = jax.tree.leaves(_empty(config, jnp.float32))
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    if count > max_parameters:
        raise ValueError(f"config has {count:,} parameters, and max_parameters is {max_parameters:,}")
    return config


def to_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """The parameters of a model by dotted paths.

    >>> from seqattn.models import RecurrentLanguageModel, RecurrentLanguageModelConfig
    >>> config = RecurrentLanguageModelConfig(11, embedding_dim=4, hidden_dim=4, tie_embeddings=True)
    >>> arrays = to_arrays(RecurrentLanguageModel(config, rngs=nnx.Rngs(0)))
    >>> sorted(arrays)[:2], arrays["embedding.table"].shape
    (['embedding.table', 'layers.0.cell.dense_h.kernel'], (11, 4))
    """
    return {_name(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def from_arrays(
    config: ModelConfig, arrays: Mapping[str, np.ndarray | jax.Array], *, param_dtype: DTypeLike = jnp.float32
) -> Any:
    """The model of a config with these parameters, which are copied; none is drawn at random.

    Args:
        config: sizes and choices.
        arrays: what `to_arrays` gave.
        param_dtype: that of the model.

    Raises:
        ValueError: naming the arrays that are missing, unknown, or of another shape or dtype.
    """
    graph, state = nnx.split(_empty(config, param_dtype))
    _check(arrays, {_name(path): leaf for path, leaf in nnx.to_flat_state(state)})

    def fill(path: tuple[str | int, ...], empty: nnx.Variable) -> nnx.Variable:
        # Not `jax.device_put`, which may keep the memory of the given array.
        return empty.replace(jnp.array(arrays[_name(path)]))

    return nnx.merge(graph, nnx.map_state(fill, state))


class _OneKey(nnx.Rngs):
    """The same key always, for shapes alone: to count the keys, as flax does, takes quadratic time in a trace."""

    def params(self) -> PRNGKeyArray:
        return jax.random.key(0)


def _empty(config: ModelConfig, param_dtype: DTypeLike) -> nnx.Module:
    """The model with shapes and dtypes in place of its parameters."""
    kind = model_type(config)
    try:
        return nnx.eval_shape(lambda: kind(config, param_dtype=param_dtype, rngs=_OneKey(0)))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"config: no {kind.__name__} has these sizes: {error}") from error


def _name(path: Iterable[object]) -> str:
    return ".".join(map(str, path))


def _check(arrays: Mapping[str, np.ndarray | jax.Array], wanted: Mapping[str, Any]) -> None:
    def described(array: Any) -> str:
        return "none" if array is None else f"{array.dtype}{list(array.shape)}"

    names = sorted(wanted.keys() | arrays.keys())
    rows = [(name, described(arrays.get(name)), described(wanted.get(name))) for name in names]
    wrong = [f"  {_shown(name)}: {given} given, {needed} wanted" for name, given, needed in rows if given != needed]
    if wrong:
        rest = [f"  and {len(wrong) - _MOST_SHOWN} more"] * (len(wrong) > _MOST_SHOWN)
        raise ValueError("\n".join(["arrays must be those of the model:", *wrong[:_MOST_SHOWN], *rest]))


def _written(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return {"type": type(value).__name__, "value": value.value}
    if dataclasses.is_dataclass(value):
        fields = {field.name: _written(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    return list(map(_written, value)) if isinstance(value, tuple) else value


def _read(value: Any, annotation: Any, path: str) -> Any:
    """A value as the annotation of its field says. So no value is nested deeper than configs are."""
    options = _options(annotation)
    if isinstance(value, Mapping):
        return _read_typed(value, [kind for kind in options if _has_name(kind)], path)
    if value is None and types.NoneType in options:
        return None
    if isinstance(value, list | tuple):
        for option in options:
            if typing.get_origin(option) is tuple:
                return _read_items(value, typing.get_args(option), path)
    if type(value) is bool and bool in options:
        return value
    if type(value) is int and int in options:
        return _in_range(value, path)
    if float in options and _is_number(value):
        return float(value)
    raise ValueError(f"{path} must be {' or '.join(map(_described, options))}, got {_shown(value)}")


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float holds without loss."""
    return math.isfinite(value) if type(value) is float else type(value) is int and abs(value) <= _EXACT


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if union else (annotation,)


def _has_name(kind: Any) -> bool:
    return isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, enum.Enum))


def _read_typed(value: Mapping[str, Any], kinds: Sequence[Any], path: str) -> Any:
    names, name = {kind.__name__: kind for kind in kinds}, value.get("type")
    if not isinstance(name, str) or name not in names:
        said = f"an object of type {' or '.join(names)}" if names else "no object"
        raise ValueError(f"{path} must be {said}, got one of type {_shown(name)}")
    kind = names[name]
    if issubclass(kind, enum.Enum):
        members, chosen = {member.value: member for member in kind}, value.get("value")
        if value.keys() != {"type", "value"} or not isinstance(chosen, str) or chosen not in members:
            raise ValueError(f"{path} must have the fields type and value, one of {', '.join(members)}")
        return members[chosen]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    none = dataclasses.MISSING
    needed = [x.name for x in fields.values() if x.default is none and x.default_factory is none]
    for given in value.keys() - {"type"} - fields.keys():
        raise ValueError(f"{path} has the unknown field {_shown(given)}; those of {name} are {', '.join(fields)}")
    for missing in [field for field in needed if field not in value]:
        raise ValueError(f"{path}.{missing} is missing, and {name} has no default for it")
    hints = _hints(kind)
    read = {field: _read(value[field], hints[field], f"{path}.{field}") for field in fields if field in value}
    try:
        return kind(**read)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_hints = functools.cache(typing.get_type_hints)


def _read_items(value: Sequence[Any], items: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    if items[-1] is Ellipsis:
        if len(value) > _MOST_LAYERS:
            raise ValueError(f"{path} must have at most {_MOST_LAYERS} items, got {len(value)}")
        items = items[:1] * len(value)
    if len(value) != len(items):
        raise ValueError(f"{path} must have {len(items)} items, got {len(value)}")
    return tuple(_read(x, item, f"{path}[{i}]") for i, (x, item) in enumerate(zip(value, items, strict=True)))


def _in_range(value: int, path: str) -> int:
    field = path.rpartition(".")[2].partition("[")[0]
    smallest, largest = 0 if field in _MAY_BE_ZERO else 1, _MOST_LAYERS if field in _LAYERS else _LARGEST
    if not smallest <= value <= largest:
        raise ValueError(f"{path} must be from {smallest} to {largest}, got {_shown(value)}")
    return value


def _described(option: Any) -> str:
    plain = {types.NoneType: "null", int: "an integer", float: "a finite number", bool: "true or false"}
    return plain.get(option) or ("a list" if typing.get_origin(option) is tuple else option.__name__)


def _shown(value: Any) -> str:
    """A value for a message, never all of what may be endless or nested without an end."""
    if value is None or isinstance(value, bool | int | float | str):
        # Python writes no integer of thousands of digits.
        return repr(value)[:80] if not isinstance(value, int) or abs(value) < _EXACT else "a huge integer"
    return f"a {type(value).__name__}"
