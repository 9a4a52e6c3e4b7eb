"""Gemma 2 (Gemma Team 2024): windows in every second layer, soft caps, and norms before and after each sublayer."""

from collections.abc import Iterator
from typing import Any

from seqattn.checks import check_number
from seqattn.interop.huggingface.family import Family, Parameter
from seqattn.interop.huggingface.fields import ACTIVATIONS, Fields
from seqattn.interop.huggingface.layouts import AboveOne
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

_NORMS = {
    "attention_residual.norm": "input_layernorm",
    "attention_residual.output_norm": "post_attention_layernorm",
    "feed_forward_residual.norm": "pre_feedforward_layernorm",
    "feed_forward_residual.output_norm": "post_feedforward_layernorm",
}


def _read(fields: Fields) -> LanguageModelConfig:
    fields.ignore("hidden_act")  # older configs; `hidden_activation` is read
    fields.alias(sliding_window_size="sliding_window")
    if fields["use_bidirectional_attention"] is not None:
        fields.require(use_bidirectional_attention=False)
    scores, logits = fields["attn_logit_softcapping"], fields["final_logit_softcapping"]
    scalar, head_dim = fields.number("query_pre_attn_scalar", above=0.0), fields.size("head_dim")
    block = {
        "activation": fields.choice("hidden_activation", ACTIVATIONS),
        "attention_scale": None if scalar == head_dim else scalar**-0.5,
        "attention_soft_cap": None if scores is None else fields.number("attn_logit_softcapping", above=0.0),
        "attention_bias": fields.flag("attention_bias"),
        "feed_forward_bias": False,
        "norm_outputs": True,
    }
    return read_config(
        fields,
        block=block,
        pattern=read_pattern(fields, default=("sliding_attention", "full_attention")),
        logits_soft_cap=None if logits is None else fields.number("final_logit_softcapping", above=0.0),
    )


def _write(config: LanguageModelConfig) -> dict[str, Any]:
    block, fields = config.block, write_config(config) | write_pattern(config)
    scale = block.attention_scale
    if scale is not None:
        check_number("attention_scale", scale, above=0)
    scalar = block.head_dim if scale is None else round(scale**-2, 6)
    return {
        **fields,
        # transformers wants a size even where no layer has a window.
        "sliding_window": 4096 if fields["sliding_window"] is None else fields["sliding_window"],
        "hidden_activation": "gelu_pytorch_tanh" if fields["hidden_act"] == "gelu_new" else fields["hidden_act"],
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": block.attention_soft_cap,
        "final_logit_softcapping": config.logits_soft_cap,
        "attention_bias": block.attention_bias,
    }


def _parameters(config: LanguageModelConfig) -> Iterator[Parameter]:
    return parameters(config, norms=_NORMS, gain=AboveOne())


GEMMA2 = Family(
    "gemma2",
    LanguageModelConfig,
    {
        **DEFAULTS,
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "use_bidirectional_attention": None,
    },
    _read,
    _write,
    _parameters,
    architecture=lambda config: "Gemma2ForCausalLM",
    **OPTIONS,
)
