"""Converts MarianMT models of Hugging Face transformers (OPUS-MT, Tiedemann 2020) to `Transformer` and back.

Two things differ. Marian's sinusoidal positions have all sines first, then all cosines; ours interleave them. Positions
are added to the embeddings, so in our order every axis of size model_dim is permuted. Marian's linear layers are stored
transposed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqattn.checks import check_even, check_integer, check_multiple, check_rate
from seqattn.models.parameter_rules import rule_of
from seqattn.models.position_encodings import Sinusoidal
from seqattn.models.transformer import Transformer, TransformerConfig
from seqattn.nn.blocks import BlockConfig
from seqattn.nn.feed_forward import Activation
from seqattn.nn.parameter_rule import Kind

Path = tuple[str | int, ...]
"""The path of a parameter in our model."""

_ACTIVATIONS = {
    "relu": Activation.RELU,
    "swish": Activation.SILU,
    "silu": Activation.SILU,
    "gelu_new": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU,
}
_SIDE = {"layers": 12, "attention_heads": 16, "ffn_dim": 4096}
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 58_101,
    "d_model": 1024,
    **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _SIDE.items()},
    "activation_function": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "scale_embedding": False,
}
"""Defaults of missing fields, from MarianConfig in transformers 5."""
_MUST_BE = {
    "scale_embedding": True,
    "static_position_embeddings": True,
    "share_encoder_decoder_embeddings": True,
    "tie_word_embeddings": True,
}
_SMALLEST = {
    **dict.fromkeys(("vocab_size", "d_model", "decoder_layers", "encoder_attention_heads", "encoder_ffn_dim"), 1),
    "encoder_layers": 0,
}
_TABLES = {"model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"}
_LAYER_NORM_EPSILON = 1e-5
_NOT_PARAMETERS = ("embed_positions.weight", "embed_tokens.weight", "lm_head.weight")
"""Sinusoids, and aliases of the shared embedding table."""


def marian_config(config: Mapping[str, Any]) -> TransformerConfig:
    """Returns our config for the fields of a MarianMT `config.json`.

    Missing fields take the defaults of transformers 5.

    Raises:
        NotImplementedError: the config uses an option that our `Transformer` lacks.
        ValueError: a size or rate is out of range, or `d_model` is odd or not a multiple of the number of heads.
    """
    config = {**_DEFAULTS, **config}
    for name, value in _MUST_BE.items():
        if config.get(name, value) != value:
            raise NotImplementedError(f"{name} must be {value}, got {config[name]}")
    activation = config["activation_function"]
    if activation not in list(_ACTIVATIONS):
        raise NotImplementedError(f"activation_function must be one of {', '.join(_ACTIVATIONS)}, got {activation}")
    for ours in ("attention_heads", "ffn_dim"):
        encoder, decoder = (config[f"{side}_{ours}"] for side in ("encoder", "decoder"))
        if encoder != decoder:
            raise NotImplementedError(f"encoder_{ours} ({encoder}) and decoder_{ours} ({decoder}) must be equal")
    _check_numbers(config)
    block = BlockConfig(
        model_dim=config["d_model"],
        hidden_dim=config["encoder_ffn_dim"],
        num_heads=config["encoder_attention_heads"],
        activation=_ACTIVATIONS[activation],
        attention_bias=True,
        norm_epsilon=_LAYER_NORM_EPSILON,
        dropout_rate=config["dropout"],
        attention_dropout_rate=config["attention_dropout"],
        hidden_dropout_rate=config["activation_dropout"],
    )
    return TransformerConfig(
        config["vocab_size"], config["encoder_layers"], config["decoder_layers"], block, Sinusoidal(), logits_bias=True
    )


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Rejects bad numbers by their name in the config, before a reshape fails without naming them."""
    for name, smallest in _SMALLEST.items():
        check_integer(name, config[name], smallest)
    model_dim, heads = config["d_model"], config["encoder_attention_heads"]
    check_even("d_model", model_dim, ": half of each vector of positions are sines")
    check_multiple("d_model", model_dim, heads, "encoder_attention_heads")
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        check_rate(config[name], name)


def from_marian(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Transformer:
    """Returns a `Transformer` with the parameters of a MarianMT model, float32.

    Args:
        config: the fields of the model's `config.json`.
        arrays: parameters by name, such as `model.encoder.layers.0.fc1.weight` `[F, D]`.

    Raises:
        NotImplementedError: the config uses an option that our `Transformer` lacks.
        ValueError: parameters are missing, unknown or of the wrong shape, tied tables differ, or a number of the config
            is out of range.
    """
    ours = marian_config(config)
    given = {name: x for name, x in arrays.items() if not name.endswith(_NOT_PARAMETERS)}
    wanted = dict(_names(ours))
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(f"parameters do not fit: missing {missing}, unknown {unknown}")
    for name, (_, axes) in wanted.items():
        _check_shape(name, axes, np.shape(given[name]), ours)
    table = np.asarray(given["model.shared.weight"])
    for name in arrays.keys() & _TABLES:
        if not np.array_equal(arrays[name], table):
            raise ValueError(f"{name} must be the same table as model.shared.weight: they are tied")
    order = _order(ours.block.model_dim)
    converted = {path: _convert(given[name], path, axes, order) for name, (path, axes) in wanted.items()}
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(ours, rngs=nnx.Rngs(0))))

    def fill(path: Path, empty: nnx.Variable) -> nnx.Variable:
        return empty.replace(jnp.asarray(converted[path], empty.dtype))

    return nnx.merge(graph, nnx.map_state(fill, state))


def to_marian(model: Transformer) -> dict[str, np.ndarray]:
    """Returns the parameters of a model under Marian's names, the inverse of `from_marian`.

    Raises:
        ValueError: the parameters of the model are not exactly those of a MarianMT model.
    """
    state = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    wanted = dict(_names(model.config))
    if {path for path, _ in wanted.values()} != state.keys():
        raise ValueError("the model must have the structure that marian_config returns: its parameters differ")
    inverse = np.argsort(_order(model.config.block.model_dim))
    return {
        name: _convert(np.asarray(state[path]), path, axes, inverse, back=True) for name, (path, axes) in wanted.items()
    }


def _check_shape(name: str, axes: str, shape: tuple[int, ...], config: TransformerConfig) -> None:
    """Rejects a wrong shape before the permutation, which would silently truncate a longer axis."""
    block = config.block
    sizes = {"1": 1, "V": config.vocab_size, "F": block.hidden_dim, "D": block.model_dim, "N": block.model_dim}
    wanted = tuple(sizes[letter] for letter in axes)
    if shape != wanted:
        raise ValueError(f"{name} must have the shape {wanted}, got {shape}")


def _order(model_dim: int) -> np.ndarray:
    """Returns the index of Marian's dimension for each of ours: we interleave sines and cosines."""
    return np.arange(model_dim).reshape(2, -1).T.reshape(-1)


def _convert(x: np.ndarray, path: Path, axes: str, order: np.ndarray, *, back: bool = False) -> np.ndarray:
    """Converts a parameter between the two layouts. `axes` names the axes of Marian's array; D is model_dim.

    Marian's matrices are `[out, in]`. Ours are transposed if the rule of their module has outputs last.
    """
    x = np.asarray(x)
    if axes == "1V":
        return x.reshape(1, -1) if back else x.reshape(-1)
    rule = rule_of("/".join(map(str, path)))
    transposed = rule is not None and rule.kind is Kind.MATRIX and rule.outputs == -1
    x = x.T if back and transposed else x
    for axis, letter in enumerate(axes):
        x = np.take(x, order, axis) if letter == "D" else x
    return x if back or not transposed else x.T


def _names(config: TransformerConfig) -> Iterator[tuple[str, tuple[Path, str]]]:
    """Yields Marian's name of each parameter, its path in our model, and the axes of Marian's array."""
    yield "model.shared.weight", (("embedding", "table"), "VD")
    yield "final_logits_bias", (("logits_bias",), "1V")
    sides = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    for side, layers in sides.items():
        for layer in range(layers):
            attentions = {"self_attn": "attention"} | (
                {"encoder_attn": "memory_attention"} if side == "decoder" else {}
            )
            for theirs, ours in attentions.items():
                yield from _attention(f"model.{side}.layers.{layer}.{theirs}", (side, layer), ours)
            yield from _feed_forward(f"model.{side}.layers.{layer}", (side, layer))


def _attention(theirs: str, block: Path, ours: str) -> Iterator[tuple[str, tuple[Path, str]]]:
    for name in ("query", "key", "value"):
        yield from _linear(f"{theirs}.{name[0]}_proj", (*block, ours, name), "ND")
    yield from _linear(f"{theirs}.out_proj", (*block, ours, "output"), "DN")
    yield from _norm(f"{theirs}_layer_norm", (*block, ours.replace("memory_attention", "memory") + "_residual"))


def _feed_forward(theirs: str, block: Path) -> Iterator[tuple[str, tuple[Path, str]]]:
    yield from _linear(f"{theirs}.fc1", (*block, "feed_forward", "hidden"), "FD")
    yield from _linear(f"{theirs}.fc2", (*block, "feed_forward", "output"), "DF")
    yield from _norm(f"{theirs}.final_layer_norm", (*block, "feed_forward_residual"))


def _linear(theirs: str, ours: Path, axes: str) -> Iterator[tuple[str, tuple[Path, str]]]:
    yield f"{theirs}.weight", ((*ours, "kernel"), axes)
    yield f"{theirs}.bias", ((*ours, "bias"), axes[0])


def _norm(theirs: str, ours: Path) -> Iterator[tuple[str, tuple[Path, str]]]:
    yield f"{theirs}.weight", ((*ours, "norm", "scale"), "D")
    yield f"{theirs}.bias", ((*ours, "norm", "bias"), "D")
