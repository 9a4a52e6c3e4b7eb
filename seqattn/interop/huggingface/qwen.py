"""Qwen 2 and 2.5 (Yang 2024), with biases of queries, keys and values, and Qwen 3 (Yang 2025), with norms of heads."""

from collections.abc import Sequence
from typing import Any

from seqattn.interop.huggingface.family import Family
from seqattn.interop.huggingface.fields import ACTIVATIONS, Fields
from seqattn.interop.huggingface.llama import (
    DEFAULTS,
    OPTIONS,
    parameters,
    read_config,
    read_pattern,
    write_config,
    write_pattern,
)
from seqattn.models.language_model import LanguageModelConfig
from seqattn.models.stack import Attention, Window


def _pattern(fields: Fields) -> Sequence[Attention]:
    """Reads what the layers attend to. Without `layer_types`, the last layers have a window, if any has."""
    windowed, first = fields.flag("use_sliding_window"), fields.size("max_window_layers", 0)
    number = fields.size("num_hidden_layers")
    kinds = ["sliding_attention" if windowed and layer >= first else "full_attention" for layer in range(number)]
    pattern = read_pattern(fields, default=kinds)
    if not windowed and any(isinstance(attention, Window) for attention in pattern):
        raise ValueError("use_sliding_window must be true where layer_types have sliding_attention")
    return pattern


def _read_2(fields: Fields) -> LanguageModelConfig:
    block = {
        "activation": fields.choice("hidden_act", ACTIVATIONS),
        "attention_bias": True,
        "output_bias": False,
        "feed_forward_bias": False,
    }
    return read_config(fields, block=block, pattern=_pattern(fields), embedding_scale=1.0)


def _read_3(fields: Fields) -> LanguageModelConfig:
    block = {
        "activation": fields.choice("hidden_act", ACTIVATIONS),
        "attention_bias": fields.flag("attention_bias"),
        "feed_forward_bias": False,
        "qk_norm": True,
    }
    return read_config(fields, block=block, pattern=_pattern(fields), embedding_scale=1.0)


def _write_2(config: LanguageModelConfig) -> dict[str, Any]:
    pattern = write_pattern(config)
    return write_config(config) | pattern | {"use_sliding_window": pattern["sliding_window"] is not None}


def _write_3(config: LanguageModelConfig) -> dict[str, Any]:
    return _write_2(config) | {"attention_bias": config.block.attention_bias}


_DEFAULTS = {
    **DEFAULTS,
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

QWEN2 = Family(
    "qwen2",
    LanguageModelConfig,
    _DEFAULTS,
    _read_2,
    _write_2,
    parameters,
    architecture=lambda config: "Qwen2ForCausalLM",
    **OPTIONS,
)
QWEN3 = Family(
    "qwen3",
    LanguageModelConfig,
    {**_DEFAULTS, "head_dim": 128},
    _read_3,
    _write_3,
    parameters,
    architecture=lambda config: "Qwen3ForCausalLM",
    **OPTIONS,
)
