"""T5 (Raffel 2020): T5 1.0 and 1.1, Flan-T5, ByT5, and mT5 (Xue 2021)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from seqattn.interop.huggingface.family import Family, Parameter, linear, norm
from seqattn.interop.huggingface.fields import Fields
from seqattn.interop.huggingface.layouts import Transposed
from seqattn.models.position_encodings import BucketBiases
from seqattn.models.transformer import TransformerConfig
from seqattn.nn.blocks import BlockConfig
from seqattn.nn.feed_forward import Activation

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32_128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "scale_decoder_outputs": None,
}
_PROJECTIONS = {
    "relu": (Activation.RELU, False),
    "gelu": (Activation.EXACT_GELU, False),
    "silu": (Activation.SILU, False),
    "gated-relu": (Activation.RELU, True),
    # In transformers too, this name is the tanh approximation.
    "gated-gelu": (Activation.GELU, True),
    "gated-silu": (Activation.SILU, True),
}
"""`feed_forward_proj`: the activation, and whether it gates."""


def _read(fields: Fields) -> TransformerConfig:
    tied = fields.flag("tie_word_embeddings")
    # T5 1.0 scales logits and T5 1.1 does not. Only this field tells them apart in the configs of their authors.
    scaled = tied if fields["scale_decoder_outputs"] is None else fields.flag("scale_decoder_outputs")
    return _read_config(fields, tied=tied, scaled=scaled)


def _read_mt5(fields: Fields) -> TransformerConfig:
    return _read_config(fields, tied=fields.flag("tie_word_embeddings"), scaled=False)


def _read_config(fields: Fields, *, tied: bool, scaled: bool) -> TransformerConfig:
    names = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
    fields.alias(hidden_size="d_model", head_dim="d_kv", **names)
    # Derived from `feed_forward_proj`, and the longest text of the training.
    fields.ignore("is_gated_act", "dense_act_fn", "n_positions")
    activation, gated = fields.choice("feed_forward_proj", _PROJECTIONS)
    num_layers = fields.size("num_layers")
    decoder = num_layers if fields["num_decoder_layers"] is None else fields.size("num_decoder_layers")
    model_dim = fields.size("d_model")
    buckets = fields.size("relative_attention_num_buckets")
    block = BlockConfig(
        model_dim=model_dim,
        hidden_dim=fields.size("d_ff"),
        num_heads=fields.size("num_heads"),
        attention_head_dim=fields.size("d_kv"),
        attention_scale=1.0,
        activation=activation,
        gated=gated,
        feed_forward_bias=False,
        norm_first=True,
        norm_epsilon=fields.number("layer_norm_epsilon"),
        rms_norm=True,
        norm_bias=False,
        dropout_rate=fields.rate("dropout_rate"),
        attention_dropout_rate=fields.rate("dropout_rate"),
        hidden_dropout_rate=fields.rate("dropout_rate"),
    )
    return TransformerConfig(
        fields.size("vocab_size"),
        num_layers,
        decoder,
        block,
        BucketBiases(buckets, fields.size("relative_attention_max_distance")),
        embedding_scale=1.0,
        tie_logits=tied,
        logits_scale=model_dim**-0.5 if scaled else 1.0,
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    block, positions = config.block, config.positions
    if not isinstance(positions, BucketBiases):
        raise ValueError(f"positions must be BucketBiases, got {positions}")
    names = {choice: name for name, choice in _PROJECTIONS.items()}
    if (block.activation, block.gated) not in names:
        known = ", ".join(f"{activation.name}, {gated}" for activation, gated in names)
        raise ValueError(f"activation and gated must be one of ({known}), got {block.activation.name}, {block.gated}")
    return {
        "vocab_size": config.vocab_size,
        "d_model": block.model_dim,
        "d_kv": block.head_dim,
        "d_ff": block.hidden_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": block.num_heads,
        "relative_attention_num_buckets": positions.num_buckets,
        "relative_attention_max_distance": positions.max_distance,
        "dropout_rate": block.dropout_rate,
        "layer_norm_epsilon": block.norm_epsilon,
        "feed_forward_proj": names[block.activation, block.gated],
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.tie_logits,
        "scale_decoder_outputs": config.logits_scale != 1,
    }


def _write_mt5(config: TransformerConfig) -> dict[str, Any]:
    return {name: value for name, value in _write(config).items() if name != "scale_decoder_outputs"}


def _parameters(config: TransformerConfig) -> Iterator[Parameter]:
    yield Parameter("shared.weight", ("embedding.table",))
    if not config.tie_logits:
        yield Parameter("lm_head.weight", ("output.kernel",), Transposed())
    for side, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        # The first layer has the table that all layers share.
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield Parameter(bias, (f"{side}_scores.bias",))
        yield from norm(f"{side}.final_layer_norm", f"{side}_norm", bias=False)
        for layer in range(layers):
            yield from _layer(f"{side}.block.{layer}.layer", f"{side}.{layer}", config.block, cross=side == "decoder")


def _layer(theirs: str, ours: str, block: BlockConfig, *, cross: bool) -> Iterator[Parameter]:
    sublayers = [("SelfAttention", "attention", "attention_residual")]
    sublayers += [("EncDecAttention", "memory_attention", "memory_residual")] * cross
    for number, (name, attention, residual) in enumerate(sublayers):
        for projection in ("query", "key", "value", "output"):
            yield from linear(
                f"{theirs}.{number}.{name}.{projection[0]}", f"{ours}.{attention}.{projection}", bias=False
            )
        yield from norm(f"{theirs}.{number}.layer_norm", f"{ours}.{residual}.norm", bias=False)
    last, network = f"{theirs}.{len(sublayers)}", f"{ours}.feed_forward"
    inner = {"wi_0": "gate", "wi_1": "hidden"} if block.gated else {"wi": "hidden"}
    for name, layer in {**inner, "wo": "output"}.items():
        yield from linear(f"{last}.DenseReluDense.{name}", f"{network}.{layer}", bias=False)
    yield from norm(f"{last}.layer_norm", f"{ours}.feed_forward_residual.norm", bias=False)


def _same(config: TransformerConfig) -> Mapping[str, str]:
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"] + ["lm_head.weight"] * config.tie_logits
    return dict.fromkeys(names, "shared.weight")


T5 = Family(
    "t5",
    TransformerConfig,
    _DEFAULTS,
    _read,
    _write,
    _parameters,
    same=_same,
    # transformers 5 writes that logits are tied even where it has a table for them, as in T5 1.1.
    untied="lm_head.weight",
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    architecture=lambda config: "T5ForConditionalGeneration",
)
"""Some checkpoints have a table for the cross-attention, which nothing reads."""

MT5 = dataclasses.replace(
    T5,
    model_type="mt5",
    read=_read_mt5,
    write=_write_mt5,
    defaults={**_DEFAULTS, "vocab_size": 250_112, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
    | {"feed_forward_proj": "gated-gelu"},
    architecture=lambda config: "MT5ForConditionalGeneration",
)
