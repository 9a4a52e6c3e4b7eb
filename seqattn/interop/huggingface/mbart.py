"""mBART (Liu 2020): BART with norms before each sublayer."""

from seqattn.interop.huggingface.bart import DEFAULTS, TIED, parameters, read_config, write_config
from seqattn.interop.huggingface.family import Family
from seqattn.interop.huggingface.fields import Fields
from seqattn.models.position_encodings import Learned
from seqattn.models.transformer import TransformerConfig

_ONCE = {
    "normalize_before": True,
    "normalize_embedding": True,
    "add_final_layer_norm": True,
    "add_bias_logits": False,
    "static_position_embeddings": False,
}
"""Fields of older configs that transformers no longer reads, with the values of the only model that it still has."""


def _read(fields: Fields) -> TransformerConfig:
    fields.require(**_ONCE)
    positions = Learned(fields.size("max_position_embeddings"))
    return read_config(fields, positions, norm_first=True, norm_embedding=True, logits_bias=True)


MBART = Family(
    "mbart",
    TransformerConfig,
    {**DEFAULTS, **_ONCE},
    _read,
    write_config,
    parameters,
    same=lambda config: TIED,
    architecture=lambda config: "MBartForConditionalGeneration",
)
