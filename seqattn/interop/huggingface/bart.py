"""BART (Lewis 2020), and what the families that share its names have in common with it."""

from collections.abc import Iterator, Mapping
from typing import Any

from seqattn.checks import check_multiple
from seqattn.interop.huggingface.family import Family, Parameter, linear, norm
from seqattn.interop.huggingface.fields import ACTIVATIONS, Fields, activation_name
from seqattn.interop.huggingface.layouts import After, Row
from seqattn.models.position_encodings import Learned, Positions
from seqattn.models.transformer import TransformerConfig
from seqattn.nn.blocks import BlockConfig

UNUSED_POSITIONS = 2
"""Rows of BART's tables of positions before that of the first token."""
EPSILON = 1e-5
"""PyTorch's default for layer norms."""
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50_265,
    "d_model": 1024,
    **{f"{side}_layers": 12 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 16 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 4096 for side in ("encoder", "decoder")},
    "max_position_embeddings": 1024,
    "activation_function": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "scale_embedding": False,
    "tie_word_embeddings": True,
}
_TABLES = ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
OPTIONS: Mapping[str, Any] = {
    "same": lambda config: {f"{name}.weight": "model.shared.weight" for name in _TABLES},
    # Bare models have no bias of logits; transformers then starts from zeros.
    "zeros": ("final_logits_bias",),
    "prefix": "model.",
}
"""What all these families have in common: one table for the source, the target and the logits."""


def older(*, norm_first: bool, norm_embedding: bool, sines: bool) -> Mapping[str, Any]:
    """Returns fields of older configs that transformers no longer reads, with the only values that a family had.

    Args:
        norm_first: if True, norms are before each sublayer.
        norm_embedding: if True, a norm follows the sum of token and position vectors.
        sines: if True, position vectors are sinusoidal, and not learned.
    """
    return {
        "normalize_before": norm_first,
        "add_final_layer_norm": norm_first,
        "normalize_embedding": norm_embedding,
        "static_position_embeddings": sines,
        "add_bias_logits": False,
    }


def read_config(fields: Fields, positions: Positions, *, norm_first: bool, **choices: Any) -> TransformerConfig:
    """Reads the fields that all these families have."""
    fields.require(tie_word_embeddings=True)
    fields.alias(hidden_size="d_model", num_attention_heads="encoder_attention_heads")
    # Whole layers that are left out in training; evaluation has all of them.
    fields.ignore("encoder_layerdrop", "decoder_layerdrop", "num_hidden_layers", "max_position_embeddings")
    encoder, decoder = _block(fields, "encoder", norm_first), _block(fields, "decoder", norm_first)
    return TransformerConfig(
        fields.size("vocab_size"),
        fields.size("encoder_layers", 0),
        fields.size("decoder_layers"),
        encoder,
        positions,
        decoder_block=None if decoder == encoder else decoder,
        embedding_scale=None if fields.flag("scale_embedding") else 1.0,
        **choices,
    )


def _block(fields: Fields, side: str, norm_first: bool) -> BlockConfig:
    heads, model_dim = fields.size(f"{side}_attention_heads"), fields.size("d_model")
    check_multiple("d_model", model_dim, heads, f"{side}_attention_heads")
    return BlockConfig(
        model_dim=model_dim,
        hidden_dim=fields.size(f"{side}_ffn_dim"),
        num_heads=heads,
        activation=fields.choice("activation_function", ACTIVATIONS),
        norm_first=norm_first,
        attention_bias=True,
        norm_epsilon=EPSILON,
        dropout_rate=fields.rate("dropout"),
        attention_dropout_rate=fields.rate("attention_dropout"),
        hidden_dropout_rate=fields.rate("activation_dropout"),
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """Returns the fields that all these families have."""
    block = config.block
    decoder = block if config.decoder_block is None else config.decoder_block
    return {
        "vocab_size": config.vocab_size,
        "d_model": block.model_dim,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "encoder_attention_heads": block.num_heads,
        "decoder_attention_heads": decoder.num_heads,
        "encoder_ffn_dim": block.hidden_dim,
        "decoder_ffn_dim": decoder.hidden_dim,
        "max_position_embeddings": config.positions.max_length if isinstance(config.positions, Learned) else 1024,
        "activation_function": activation_name(block.activation),
        "dropout": block.dropout_rate,
        "attention_dropout": block.attention_dropout_rate,
        "activation_dropout": block.hidden_dropout_rate,
        "scale_embedding": config.embedding_scale is None,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }


def parameters(config: TransformerConfig) -> Iterator[Parameter]:
    """Yields the arrays of a model of any of these families."""
    yield Parameter("model.shared.weight", ("embedding.table",))
    if config.logits_bias:
        yield Parameter("final_logits_bias", ("logits_bias",), Row())
    ours = {"encoder": "source", "decoder": "target"}
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    for side in ("encoder", "decoder"):
        if isinstance(config.positions, Learned):
            table = f"{ours[side]}_positions.table"
            yield Parameter(f"model.{side}.embed_positions.weight", (table,), After(UNUSED_POSITIONS))
        if config.norm_embedding:
            yield from norm(f"model.{side}.layernorm_embedding", f"{ours[side]}_norm")
        for layer in range(layers[side]):
            yield from _layer(f"model.{side}.layers.{layer}", f"{side}.{layer}", cross=side == "decoder")
        if config.block.norm_first:
            yield from norm(f"model.{side}.layer_norm", f"{side}_norm")


def _layer(theirs: str, ours: str, *, cross: bool) -> Iterator[Parameter]:
    yield from _attention(f"{theirs}.self_attn", f"{ours}.attention")
    yield from norm(f"{theirs}.self_attn_layer_norm", f"{ours}.attention_residual.norm")
    if cross:
        yield from _attention(f"{theirs}.encoder_attn", f"{ours}.memory_attention")
        yield from norm(f"{theirs}.encoder_attn_layer_norm", f"{ours}.memory_residual.norm")
    yield from linear(f"{theirs}.fc1", f"{ours}.feed_forward.hidden")
    yield from linear(f"{theirs}.fc2", f"{ours}.feed_forward.output")
    yield from norm(f"{theirs}.final_layer_norm", f"{ours}.feed_forward_residual.norm")


def _attention(theirs: str, ours: str) -> Iterator[Parameter]:
    for name in ("query", "key", "value"):
        yield from linear(f"{theirs}.{name[0]}_proj", f"{ours}.{name}")
    yield from linear(f"{theirs}.out_proj", f"{ours}.output")


_OLDER = older(norm_first=False, norm_embedding=True, sines=False)


def _read(fields: Fields) -> TransformerConfig:
    fields.require(**_OLDER)
    positions = Learned(fields.size("max_position_embeddings"))
    return read_config(fields, positions, norm_first=False, norm_embedding=True, logits_bias=True)


BART = Family(
    "bart",
    TransformerConfig,
    {**DEFAULTS, **_OLDER},
    _read,
    write_config,
    parameters,
    **OPTIONS,
    architecture=lambda config: "BartForConditionalGeneration",
)
