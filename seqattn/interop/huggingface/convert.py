"""Converts models of transformers to ours and back, by the table of their family."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from seqattn.interop.codec import shown
from seqattn.interop.huggingface.families import FAMILIES
from seqattn.interop.huggingface.family import Family, Parameter, Path
from seqattn.interop.huggingface.fields import Fields
from seqattn.interop.huggingface.placed import placed
from seqattn.interop.saved import ModelConfig, empty_model, model_type
from seqattn.nn.int8 import check_not_quantized

_MOST_SHOWN = 6
_LONGEST = 120
"""How many letters of a value a message shows."""
_OLD_ENDS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Names of TensorFlow, as in the checkpoints of BERT's authors, and their names today."""

Shardings = Callable[[nnx.Module], Any]
"""Returns the tree of a model's parameters with a `jax.sharding.Sharding` in place of each, given its shapes."""


def huggingface_config(fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> ModelConfig:
    """Returns our config for the fields of a `config.json`. Missing fields take the defaults of transformers 5.

    Args:
        fields: the fields of `config.json`.
        arrays: the arrays of the checkpoint, if they shall decide whether logits are tied, as in `from_huggingface`. At
            most two of them are read.

    Raises:
        NotImplementedError: the family is unknown, or a field is unknown or has a value that we lack. Names it.
        ValueError: a field is missing, mistyped or out of range, or sizes do not fit together.

    >>> fields = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 5}
    >>> huggingface_config(fields).positions
    Learned(max_length=5)
    >>> huggingface_config(fields | {"reorder_and_upcast_attn": True})
    Traceback (most recent call last):
    NotImplementedError: gpt2: reorder_and_upcast_attn must be False, got True
    """
    family = _family(fields)
    config = _read(family, fields)
    config = config if arrays is None else _untied(family, config, arrays)
    _empty(family, config, jnp.float32)
    return config


def from_huggingface(
    fields: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    *,
    param_dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
) -> Any:
    """Builds the model of a `config.json` with the parameters of its checkpoint.

    Reads one array at a time, and copies it once. So a mapping that reads from a file, or whose arrays are views of a
    file, keeps no second copy of the model in memory.

    Args:
        fields: the fields of `config.json`.
        arrays: arrays by the names of transformers. Each is read once; those of tied parameters are compared.
        param_dtype: dtype of the parameters, floating-point.
        shardings: places the parameters. Given the model with shapes in place of its parameters, returns the tree of
            `nnx.state(model)` with a `jax.sharding.Sharding` in place of each. Devices get their own parts only. If
            None, all are on the default device.

    Raises:
        NotImplementedError: the family is unknown, or a field is unknown or has a value that we lack.
        ValueError: a field is out of range, arrays are missing, unknown or of the wrong shape, tied ones differ, or
            `shardings` returns another tree.
    """
    if not jnp.issubdtype(param_dtype, jnp.floating):
        raise ValueError(f"param_dtype must be a floating-point type, got {np.dtype(param_dtype)}")
    family = _family(fields)
    config = huggingface_config(fields, arrays)
    model = _empty(family, config, param_dtype)
    places = _places(model, shardings)
    graph, state = nnx.split(model)
    empty = {_dotted(path): leaf for path, leaf in nnx.to_flat_state(state)}
    parameters = list(family.parameters(config))
    stored = _stored(family, config, parameters, arrays)
    filled: dict[Path, jax.Array] = {}
    for parameter in parameters:
        shapes = [tuple(empty[path].shape) for path in parameter.paths]
        wanted = parameter.layout.shape(shapes)
        array = arrays[stored[parameter.name]] if parameter.name in stored else np.zeros(wanted, np.float32)
        parts = _parts(parameter, array, shapes)
        for path, part in zip(parameter.paths, parts, strict=True):
            filled[path] = placed(part, empty[path].dtype, places.get(path))
        del array, parts, part  # views of the array, which must go before the next one is read
    return nnx.merge(graph, nnx.map_state(lambda path, leaf: leaf.replace(filled[_dotted(path)]), state))


def to_huggingface(model: Any, family: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the fields of a `config.json` and the arrays of a model, the inverse of `from_huggingface`.

    Args:
        model: a model of this library.
        family: the name of the family, the `model_type` of its configs.

    Raises:
        NotImplementedError: the family is unknown.
        ValueError: the family has no model like this one, or the model is quantized; names what differs.
    """
    check_not_quantized(model, "saved as arrays; save the model that it was made from")
    kind = _family({"model_type": family})
    config: ModelConfig = model.config
    fields = _written(kind, config)
    state = {_dotted(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    arrays = {
        parameter.name: np.ascontiguousarray(
            parameter.layout.write([np.asarray(state[path]) for path in parameter.paths])
        )
        for parameter in kind.parameters(config)
    }
    return fields, arrays


def _dotted(path: Iterable[object]) -> Path:
    return ".".join(map(str, path))


def _places(model: nnx.Module, shardings: Shardings | None) -> dict[Path, Sharding]:
    """Returns the sharding of each parameter by path; empty if none is asked for."""
    if shardings is None:
        return {}
    tree = shardings(model)
    names = nnx.map_state(lambda path, leaf: leaf.replace(_dotted(path)), nnx.state(model))
    places, wanted = jax.tree.leaves(tree), jax.tree.structure(names)
    if not wanted == jax.tree.structure(tree) or not all(isinstance(x, Sharding) for x in places):  # type: ignore[operator]
        raise ValueError("shardings must return the tree of nnx.state(model) with a Sharding in place of each array")
    return dict(zip(jax.tree.leaves(names), places, strict=True))


def _parts(parameter: Parameter, array: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> Sequence[np.ndarray]:
    """Returns our parameters of an array, after a check of its shape and dtype."""
    wanted = parameter.layout.shape(shapes)
    if tuple(array.shape) != wanted:
        raise ValueError(f"{parameter.name} must have the shape {list(wanted)}, got {list(array.shape)}")
    if not np.issubdtype(array.dtype, np.floating) and array.dtype != jnp.bfloat16:
        raise ValueError(f"{parameter.name} must hold floating-point numbers, got {array.dtype}")
    return parameter.layout.read(array, shapes)


def _family(fields: Mapping[str, Any]) -> Family:
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise NotImplementedError(f"model_type must be one of {', '.join(sorted(FAMILIES))}, got {shown(name)}")
    return FAMILIES[name]


def _read(family: Family, values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(values, family.defaults)
    try:
        config = family.read(fields)
        fields.finish()
    except (NotImplementedError, ValueError) as error:
        raise type(error)(f"{family.model_type}: {error}") from error
    return config


def _empty(family: Family, config: ModelConfig, param_dtype: DTypeLike) -> nnx.Module:
    """Returns the model of shapes. Raises ValueError if sizes do not fit together."""
    try:
        return empty_model(config, param_dtype)
    except ValueError as error:
        raise ValueError(f"{family.model_type}: {error}") from error


def _untied(family: Family, config: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Returns the config with logits that are not tied, if the checkpoint has others than the config says."""
    if not (family.untied and config.tie_logits and family.untied in arrays):
        return config
    same = family.same(config)
    table = same[family.untied]
    names = [name for name in (table, *same) if same.get(name, name) == table and name != family.untied]
    held = next((name for name in names if name in arrays), None)
    if held is None or np.array_equal(arrays[held], arrays[family.untied]):
        return config
    return dataclasses.replace(config, tie_logits=False)


def _written(family: Family, config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a config, after a check that they mean the same config."""
    lacks = f"{family.model_type} has no such {model_type(config).__name__}"
    if not isinstance(config, family.kind):
        raise ValueError(f"{lacks}: its config must be a {family.kind.__name__}, got {type(config).__name__}")
    try:
        fields = {"model_type": family.model_type, "architectures": [family.architecture(config)]}
        fields |= family.write(config)
        back = _read(family, fields)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"{lacks}: {error}") from error
    if back != config:
        raise ValueError(f"{lacks}: {_difference(back, config)}")
    return fields


def _difference(theirs: Any, ours: Any, path: str = "") -> str:
    """Names the first field in which two configs differ."""
    names = getattr(ours, "__dataclass_fields__", None)
    if names is None or type(theirs) is not type(ours):
        return f"{path or 'its config'} must be {repr(theirs)[:_LONGEST]}, got {repr(ours)[:_LONGEST]}"
    name = next(name for name in names if getattr(theirs, name) != getattr(ours, name))
    return _difference(getattr(theirs, name), getattr(ours, name), f"{path}.{name}".strip("."))


def _stored(
    family: Family, config: ModelConfig, parameters: list[Parameter], arrays: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """Returns for each parameter the name under which the checkpoint has it.

    Raises:
        ValueError: arrays are missing or unknown, or tied ones differ.
    """
    wanted, same = {parameter.name for parameter in parameters}, family.same(config)
    names = _names(family, wanted | same.keys(), arrays)
    found: dict[str, str] = {}
    unknown = []
    for name in sorted(names, key=lambda name: name in same):
        known = same.get(name, name)
        if known in found:
            # Both are tied in the library that wrote them, so they cannot differ in a model that it would load.
            if not np.array_equal(arrays[names[name]], arrays[found[known]]):
                raise ValueError(f"{names[name]} must equal {found[known]}: the model has one array for both")
        elif known in wanted:
            found[known] = names[name]
        elif not any(fnmatchcase(name, pattern) for pattern in family.ignored):
            unknown.append(names[name])
    missing = sorted(wanted - found.keys() - set(family.zeros))
    if missing or unknown:
        raise ValueError(
            f"{family.model_type}: arrays must match the config: missing {_few(missing)}; unknown {_few(unknown)}"
        )
    return found


def _names(family: Family, known: Set[str], arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns the names of a checkpoint by those that transformers gives them today."""

    def now(name: str) -> str:
        for old, new in _OLD_ENDS.items():
            if name.endswith(old) and (renamed := name.removesuffix(old) + new) not in arrays:
                name = renamed
        full = family.prefix + name
        # A bare model, saved without its head, has names without the prefix.
        return full if bare and (full in known or name not in known) else name

    bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in arrays)
    return {now(name): name for name in arrays}


def _few(names: list[str]) -> str:
    rest = f" and {len(names) - _MOST_SHOWN} more" * (len(names) > _MOST_SHOWN)
    return (", ".join(map(shown, names[:_MOST_SHOWN])) or "none") + rest
