"""Mistral 7B (Jiang 2023): Llama with a sliding window."""

from typing import Any

from seqattn.interop.huggingface.family import Family
from seqattn.interop.huggingface.fields import ACTIVATIONS, Fields
from seqattn.interop.huggingface.llama import DEFAULTS, OPTIONS, parameters, read_config, write_config, write_pattern
from seqattn.models.language_model import LanguageModelConfig
from seqattn.models.stack import Full, Window


def _read(fields: Fields) -> LanguageModelConfig:
    pattern = (Full() if fields["sliding_window"] is None else Window(fields.size("sliding_window")),)
    block = {"activation": fields.choice("hidden_act", ACTIVATIONS), "feed_forward_bias": False}
    return read_config(fields, block=block, pattern=pattern, embedding_scale=1.0)


def _write(config: LanguageModelConfig) -> dict[str, Any]:
    return write_config(config) | {"sliding_window": write_pattern(config)["sliding_window"]}


MISTRAL = Family(
    "mistral",
    LanguageModelConfig,
    {
        **DEFAULTS,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    _read,
    _write,
    parameters,
    architecture=lambda config: "MistralForCausalLM",
    **OPTIONS,
)
