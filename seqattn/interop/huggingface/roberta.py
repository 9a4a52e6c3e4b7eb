"""RoBERTa (Liu 2019): BERT with other names of heads, and positions that start at 2."""

from collections.abc import Iterator

from seqattn.interop.huggingface.bart import UNUSED_POSITIONS
from seqattn.interop.huggingface.bert import DEFAULTS, architecture, body, read_config, write_config
from seqattn.interop.huggingface.family import Family, Parameter, linear, norm
from seqattn.interop.huggingface.fields import Fields
from seqattn.interop.huggingface.layouts import After
from seqattn.models.encoder import EncoderConfig, MaskedTokens, TextLabels, TokenLabels


def _read(fields: Fields) -> EncoderConfig:
    # The number of the padding token is also an offset of positions.
    fields.require(pad_token_id=UNUSED_POSITIONS - 1)
    return read_config(fields, "Roberta", UNUSED_POSITIONS)


def _parameters(config: EncoderConfig) -> Iterator[Parameter]:
    yield from body(config, "roberta")
    table = "roberta.embeddings.position_embeddings.weight"
    yield Parameter(table, ("learned.table",), After(UNUSED_POSITIONS))
    if isinstance(config.head, MaskedTokens):
        yield from linear("lm_head.dense", "head.hidden")
        yield from norm("lm_head.layer_norm", "head.norm")
        yield Parameter("lm_head.bias", ("head.bias",))
    elif isinstance(config.head, TextLabels):
        yield from linear("classifier.dense", "head.hidden")
        yield from linear("classifier.out_proj", "head.output")
    elif isinstance(config.head, TokenLabels):
        yield from linear("classifier", "head.output")


ROBERTA = Family(
    "roberta",
    EncoderConfig,
    {**DEFAULTS, "vocab_size": 50_265, "pad_token_id": UNUSED_POSITIONS - 1},
    _read,
    lambda config: write_config(config, UNUSED_POSITIONS),
    _parameters,
    same=lambda config: {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    ignored=("*embeddings.position_ids", "*pooler.dense.*"),
    prefix="roberta.",
    architecture=lambda config: architecture("Roberta", config),
)
