"""DistilBERT (Sanh 2019): half of BERT's layers, and no token types."""

from collections.abc import Iterator, Mapping
from typing import Any

from seqattn.checks import check_multiple
from seqattn.interop.huggingface.bert import architecture, read_head, write_head
from seqattn.interop.huggingface.family import Family, Parameter, linear, norm
from seqattn.interop.huggingface.fields import ACTIVATIONS, Fields, activation_name
from seqattn.models.encoder import EncoderConfig, MaskedTokens, TextLabels, TokenLabels
from seqattn.models.position_encodings import Learned
from seqattn.nn.blocks import BlockConfig
from seqattn.nn.feed_forward import Activation

_EPSILON = 1e-12
_DEFAULTS: Mapping[str, Any] = {
    "architectures": None,
    "id2label": None,
    "num_labels": 2,
    "problem_type": None,
    "vocab_size": 30_522,
    "max_position_embeddings": 512,
    "n_layers": 6,
    "n_heads": 12,
    "dim": 768,
    "hidden_dim": 3072,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation": "gelu",
    "tie_word_embeddings": True,
}


def _read(fields: Fields) -> EncoderConfig:
    fields.require(tie_word_embeddings=True)
    fields.alias(hidden_size="dim", num_attention_heads="n_heads", num_hidden_layers="n_layers")
    # Sinusoids are stored like learned positions. The rest are rates of heads.
    fields.ignore("sinusoidal_pos_embds", "tie_weights_", "qa_dropout", "seq_classif_dropout")
    model_dim, heads = fields.size("dim"), fields.size("n_heads")
    check_multiple("dim", model_dim, heads, "n_heads")
    head = read_head(fields, "DistilBert", "activation", _EPSILON, hidden=Activation.RELU)
    block = BlockConfig(
        model_dim=model_dim,
        hidden_dim=fields.size("hidden_dim"),
        num_heads=heads,
        activation=fields.choice("activation", ACTIVATIONS),
        attention_bias=True,
        norm_epsilon=_EPSILON,
        dropout_rate=fields.rate("dropout"),
        attention_dropout_rate=fields.rate("attention_dropout"),
    )
    positions = Learned(fields.size("max_position_embeddings"))
    choices: dict[str, Any] = {"head": head, "embedding_scale": 1.0, "norm_embedding": True}
    return EncoderConfig(fields.size("vocab_size"), fields.size("n_layers"), block, positions, **choices)


def _write(config: EncoderConfig) -> dict[str, Any]:
    block, positions = config.block, config.positions
    if not isinstance(positions, Learned):
        raise ValueError(f"positions must be Learned, got {positions}")
    return {
        **write_head(config),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": positions.max_length,
        "n_layers": config.num_layers,
        "n_heads": block.num_heads,
        "dim": block.model_dim,
        "hidden_dim": block.hidden_dim,
        "dropout": block.dropout_rate,
        "attention_dropout": block.attention_dropout_rate,
        "activation": activation_name(block.activation),
    }


def _parameters(config: EncoderConfig) -> Iterator[Parameter]:
    start = "distilbert.embeddings"
    yield Parameter(f"{start}.word_embeddings.weight", ("embedding.table",))
    yield Parameter(f"{start}.position_embeddings.weight", ("learned.table",))
    yield from norm(f"{start}.LayerNorm", "embedding_norm")
    for layer in range(config.num_layers):
        theirs, ours = f"distilbert.transformer.layer.{layer}", f"stack.blocks.{layer}"
        for name, part in {"q": "query", "k": "key", "v": "value", "out": "output"}.items():
            yield from linear(f"{theirs}.attention.{name}_lin", f"{ours}.attention.{part}")
        yield from norm(f"{theirs}.sa_layer_norm", f"{ours}.attention_residual.norm")
        yield from linear(f"{theirs}.ffn.lin1", f"{ours}.feed_forward.hidden")
        yield from linear(f"{theirs}.ffn.lin2", f"{ours}.feed_forward.output")
        yield from norm(f"{theirs}.output_layer_norm", f"{ours}.feed_forward_residual.norm")
    if isinstance(config.head, MaskedTokens):
        yield from linear("vocab_transform", "head.hidden")
        yield from norm("vocab_layer_norm", "head.norm")
        yield Parameter("vocab_projector.bias", ("head.bias",))
    elif isinstance(config.head, TextLabels):
        yield from linear("pre_classifier", "head.hidden")
    if isinstance(config.head, TextLabels | TokenLabels):
        yield from linear("classifier", "head.output")


DISTILBERT = Family(
    "distilbert",
    EncoderConfig,
    _DEFAULTS,
    _read,
    _write,
    _parameters,
    same=lambda config: {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    ignored=("*embeddings.position_ids",),
    prefix="distilbert.",
    architecture=lambda config: architecture("DistilBert", config),
)
