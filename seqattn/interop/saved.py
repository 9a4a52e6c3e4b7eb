"""Converts any model to JSON values and named arrays and back, to be saved in any format. Safe for untrusted files.

A config is a tree of JSON values in which dataclasses and enums store the name of their type. Parameters are arrays by
dotted path, such as `encoder.0.attention.query.kernel`. A table shared by two layers is stored once.
"""

import math
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from seqattn.interop.codec import from_json, shown, to_json
from seqattn.models.captioner import Captioner, CaptionerConfig
from seqattn.models.encoder import Encoder, EncoderConfig
from seqattn.models.language_model import LanguageModel, LanguageModelConfig
from seqattn.models.recurrent_language_model import RecurrentLanguageModel, RecurrentLanguageModelConfig
from seqattn.models.seq2seq import Seq2Seq, Seq2SeqConfig
from seqattn.models.transformer import Transformer, TransformerConfig
from seqattn.nn.int8 import check_not_quantized

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
    typing.get_type_hints(model.__init__)["config"]: model
    for model in (Captioner, Encoder, LanguageModel, RecurrentLanguageModel, Seq2Seq, Transformer)
}
"""Maps each config type to its model, read from the annotation of the model's `__init__`."""

_LARGEST = 2**31 - 1
_MOST_LAYERS = 256
"""Also the maximum number of items in a list. Even shapes alone take seconds for this many layers."""
_LAYERS = ("num_layers", "num_encoder_layers", "num_decoder_layers")
_MAY_BE_ZERO = (*_LAYERS, "vocab_size", "radius", "first", "num_types")
_MOST_SHOWN = 12


def model_type(config: ModelConfig) -> type:
    """Returns the model class of a config.

    >>> model_type(TransformerConfig(11)).__name__
    'Transformer'
    """
    return _MODELS[type(config)]


def to_dict(config: ModelConfig) -> dict[str, Any]:
    """Converts a model's config to JSON values.

    Raises:
        ValueError: the config has a type or a value that `from_dict` would reject.

    >>> from seqattn.models import Learned
    >>> values = to_dict(LanguageModelConfig(11, num_layers=1, positions=Learned(64)))
    >>> values["type"], values["positions"], values["block"]["activation"]
    ('LanguageModelConfig', {'type': 'Learned', 'max_length': 64}, {'type': 'Activation', 'value': 'relu'})
    """
    try:
        values: dict[str, Any] = to_json(config, ModelConfig)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if from_json(values, ModelConfig, check=_check_limits) != config:
        raise ValueError("config must contain only types of seqattn.models: it would be read back as another config")
    return values


def from_dict(values: Any, *, max_parameters: int = 1_000_000_000) -> ModelConfig:
    """Reads a config that `to_dict` wrote. Safe for untrusted input.

    Missing fields take their defaults. Checks that a model can be built from the config, without allocating its
    parameters.

    Args:
        values: what `json.loads` returned.
        max_parameters: maximum number of parameters of the model.

    Raises:
        ValueError: a field is unknown, missing or mistyped, a number is not finite or out of range, there are more than
            256 layers, sizes do not fit together, or there are too many parameters. Names the field and the rule.

    >>> from_dict({"type": "Seq2SeqConfig", "vocab_size": 11, "num_layers": True})
    Traceback (most recent call last):
    ValueError: config.num_layers must be an integer, got True
    """
    config: ModelConfig = from_json(values, ModelConfig, check=_check_limits)
    leaves = jax.tree.leaves(empty_model(config, jnp.float32))
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    if count > max_parameters:
        raise ValueError(f"config has {count:,} parameters, and max_parameters is {max_parameters:,}")
    return config


def to_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the parameters of a model by dotted path, as NumPy arrays.

    Raises:
        ValueError: the model is quantized, and `from_arrays` could not build it.

    >>> from seqattn.models import RecurrentLanguageModel, RecurrentLanguageModelConfig
    >>> config = RecurrentLanguageModelConfig(11, embedding_dim=4, hidden_dim=4, tie_embeddings=True)
    >>> arrays = to_arrays(RecurrentLanguageModel(config, rngs=nnx.Rngs(0)))
    >>> sorted(arrays)[:2], arrays["embedding.table"].shape
    (['embedding.table', 'layers.0.cell.dense_h.kernel'], (11, 4))
    """
    check_not_quantized(model, "saved as arrays; save the model that it was made from")
    return {_name(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def from_arrays(
    config: ModelConfig,
    arrays: Mapping[str, np.ndarray | jax.Array],
    *,
    param_dtype: DTypeLike = jnp.float32,
    place: Callable[[str, Any], Any] | None = None,
) -> Any:
    """Builds the model of a config with the given parameters. Copies the arrays and draws no random numbers.

    Args:
        config: sizes and options.
        arrays: parameters by dotted path, as `to_arrays` returns them.
        param_dtype: dtype of the parameters; must be the dtype of the arrays.
        place: puts each array on devices, given its path, for example split over a mesh, and returns it. If None, all
            are on the default device.

    Raises:
        ValueError: arrays are missing, unknown, or of the wrong shape or dtype; names them.
    """
    graph, state = nnx.split(empty_model(config, param_dtype))
    _check(arrays, {_name(path): leaf for path, leaf in nnx.to_flat_state(state)})

    def fill(path: tuple[str | int, ...], empty: nnx.Variable) -> nnx.Variable:
        array = arrays[_name(path)]
        # A copy: `jax.device_put` may share memory with the caller's array.
        return empty.replace(jnp.array(array) if place is None else place(_name(path), array))

    return nnx.merge(graph, nnx.map_state(fill, state))


class _OneKey(nnx.Rngs):
    """Always returns the same key, since only shapes matter. Flax's key counter takes quadratic time in a trace."""

    def params(self) -> PRNGKeyArray:
        return jax.random.key(0)


def empty_model(config: ModelConfig, param_dtype: DTypeLike) -> nnx.Module:
    """Returns the model of a config with shapes and dtypes in place of its parameters.

    Raises:
        ValueError: the sizes of the config do not fit together.
    """
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
    wrong = [f"  {shown(name)}: {given} given, {needed} wanted" for name, given, needed in rows if given != needed]
    if wrong:
        rest = [f"  and {len(wrong) - _MOST_SHOWN} more"] * (len(wrong) > _MOST_SHOWN)
        raise ValueError("\n".join(["arrays must match the model:", *wrong[:_MOST_SHOWN], *rest]))


def _check_limits(path: str, value: Any) -> None:
    """Rejects numbers that are not finite or out of range, and lists that are too long."""
    if isinstance(value, list | tuple):
        if len(value) > _MOST_LAYERS:
            raise ValueError(f"{path} must have at most {_MOST_LAYERS} items, got {len(value)}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} must be a finite number, got {value}")
    else:
        field = path.rpartition(".")[2].partition("[")[0]
        smallest, largest = 0 if field in _MAY_BE_ZERO else 1, _MOST_LAYERS if field in _LAYERS else _LARGEST
        if not smallest <= value <= largest:
            raise ValueError(f"{path} must be from {smallest} to {largest}, got {shown(value)}")
