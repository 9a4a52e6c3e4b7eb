"""BERT (Devlin 2019), and what RoBERTa and DistilBERT have in common with it.

Bare models, and those for masked tokens, labels of texts and labels of tokens, by the class that a config names.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from seqattn.checks import check_multiple
from seqattn.interop.codec import shown
from seqattn.interop.huggingface.family import Family, Parameter, linear, norm
from seqattn.interop.huggingface.fields import ACTIVATIONS, Fields, activation_name
from seqattn.models.encoder import EncoderConfig, Head, MaskedTokens, Pooling, TextLabels, TokenLabels, TokenVectors
from seqattn.models.position_encodings import Learned
from seqattn.nn.blocks import BlockConfig
from seqattn.nn.feed_forward import Activation

DEFAULTS: Mapping[str, Any] = {
    "architectures": None,
    "id2label": None,
    "num_labels": 2,
    "problem_type": None,
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_HEADS = {
    "Model": TokenVectors,
    "ForMaskedLM": MaskedTokens,
    "ForPreTraining": MaskedTokens,
    "ForSequenceClassification": TextLabels,
    "ForTokenClassification": TokenLabels,
}
"""Our head by the end of the name of a class. Of two ends, the first one is written."""
_POOLER = ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")


def read_head(
    fields: Fields, name: str, activation: str, epsilon: float, *, hidden: Activation = Activation.TANH
) -> Head:
    """Reads the head from the class that the config names, such as `BertForMaskedLM`; without a class, there is none.

    Args:
        fields: the fields.
        name: how the classes of the family begin, such as "Bert".
        activation: the name of the field of the activation.
        epsilon: that of layer norms.
        hidden: the nonlinearity between the two layers of the head for labels of texts.
    """
    given, kinds = fields["architectures"] or [f"{name}Model"], {name + end: kind for end, kind in _HEADS.items()}
    named = given[0] if isinstance(given, list | tuple) else None
    if not isinstance(named, str) or named not in kinds:
        got = shown(given if named is None else named)
        raise NotImplementedError(f"architectures must be a list with one of {', '.join(kinds)}, got {got}")
    kind = kinds[named]
    if kind is MaskedTokens:
        return MaskedTokens(fields.choice(activation, ACTIVATIONS), epsilon)
    if kind is TokenVectors:
        return TokenVectors()
    labels = fields["id2label"]
    number = fields.size("num_labels") if not isinstance(labels, Mapping) else len(labels)
    if fields["problem_type"] == "regression":
        raise NotImplementedError("problem_type must be a classification, got 'regression'")
    return TextLabels(number, Pooling.FIRST, hidden) if kind is TextLabels else TokenLabels(number)


def write_head(config: EncoderConfig) -> dict[str, Any]:
    """Returns the labels of a head, if it has any."""
    if not isinstance(config.head, TextLabels | TokenLabels):
        return {}
    return {"id2label": {str(label): f"LABEL_{label}" for label in range(config.head.num_labels)}}


def architecture(name: str, config: EncoderConfig) -> str:
    """Returns the class of transformers for a head."""
    return name + next(end for end, kind in _HEADS.items() if kind is type(config.head))


def read_config(fields: Fields, name: str, unused: int = 0) -> EncoderConfig:
    """Reads the fields of BERT and RoBERTa.

    Args:
        fields: the fields.
        name: how the classes of the family begin.
        unused: number of rows of the table of positions before that of the first token.
    """
    fields.require(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    # Notes of BERT's authors on their pooler, in multilingual and cased models.
    fields.ignore("directionality", *(f"pooler_{name}" for name in _POOLER))
    fields.require(tie_word_embeddings=True)
    model_dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    check_multiple("hidden_size", model_dim, heads, "num_attention_heads")
    epsilon = fields.number("layer_norm_eps")
    block = BlockConfig(
        model_dim=model_dim,
        hidden_dim=fields.size("intermediate_size"),
        num_heads=heads,
        activation=fields.choice("hidden_act", ACTIVATIONS),
        attention_bias=True,
        norm_epsilon=epsilon,
        dropout_rate=fields.rate("hidden_dropout_prob"),
        attention_dropout_rate=fields.rate("attention_probs_dropout_prob"),
    )
    return EncoderConfig(
        fields.size("vocab_size"),
        fields.size("num_hidden_layers"),
        block,
        Learned(fields.size("max_position_embeddings", unused + 1) - unused),
        head=read_head(fields, name, "hidden_act", epsilon),
        embedding_scale=1.0,
        norm_embedding=True,
        num_types=fields.size("type_vocab_size"),
    )


def write_config(config: EncoderConfig, unused: int = 0) -> dict[str, Any]:
    """Returns the fields of BERT and RoBERTa."""
    block, positions = config.block, config.positions
    if not isinstance(positions, Learned):
        raise ValueError(f"positions must be Learned, got {positions}")
    return {
        **write_head(config),
        "vocab_size": config.vocab_size,
        "hidden_size": block.model_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": block.num_heads,
        "intermediate_size": block.hidden_dim,
        "hidden_act": activation_name(block.activation),
        "hidden_dropout_prob": block.dropout_rate,
        "attention_probs_dropout_prob": block.attention_dropout_rate,
        "max_position_embeddings": positions.max_length + unused,
        "type_vocab_size": config.num_types,
        "layer_norm_eps": block.norm_epsilon,
    }


def body(config: EncoderConfig, prefix: str) -> Iterator[Parameter]:
    """Yields the arrays of BERT and RoBERTa without position vectors and head."""
    yield Parameter(f"{prefix}.embeddings.word_embeddings.weight", ("embedding.table",))
    yield Parameter(f"{prefix}.embeddings.token_type_embeddings.weight", ("types.table",))
    yield from norm(f"{prefix}.embeddings.LayerNorm", "embedding_norm")
    for layer in range(config.num_layers):
        theirs, ours = f"{prefix}.encoder.layer.{layer}", f"stack.blocks.{layer}"
        for name in ("query", "key", "value"):
            yield from linear(f"{theirs}.attention.self.{name}", f"{ours}.attention.{name}")
        yield from linear(f"{theirs}.attention.output.dense", f"{ours}.attention.output")
        yield from norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_residual.norm")
        yield from linear(f"{theirs}.intermediate.dense", f"{ours}.feed_forward.hidden")
        yield from linear(f"{theirs}.output.dense", f"{ours}.feed_forward.output")
        yield from norm(f"{theirs}.output.LayerNorm", f"{ours}.feed_forward_residual.norm")


def _parameters(config: EncoderConfig) -> Iterator[Parameter]:
    yield from body(config, "bert")
    yield Parameter("bert.embeddings.position_embeddings.weight", ("learned.table",))
    if isinstance(config.head, MaskedTokens):
        yield from linear("cls.predictions.transform.dense", "head.hidden")
        yield from norm("cls.predictions.transform.LayerNorm", "head.norm")
        yield Parameter("cls.predictions.bias", ("head.bias",))
    elif isinstance(config.head, TextLabels):
        yield from linear("bert.pooler.dense", "head.hidden")
    if isinstance(config.head, TextLabels | TokenLabels):
        yield from linear("classifier", "head.output")


BERT = Family(
    "bert",
    EncoderConfig,
    DEFAULTS,
    lambda fields: read_config(fields, "Bert"),
    write_config,
    _parameters,
    same=lambda config: {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    # Numbers of positions, and the layer of the first token, which only labels of texts read.
    ignored=("*embeddings.position_ids", "*pooler.dense.*", "cls.seq_relationship.*"),
    prefix="bert.",
    architecture=lambda config: architecture("Bert", config),
)
