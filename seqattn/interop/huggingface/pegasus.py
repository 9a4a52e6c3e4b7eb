"""Pegasus (Zhang 2020): norms before each sublayer, and sinusoidal positions with all sines first."""

from seqattn.interop.huggingface.bart import DEFAULTS, TIED, parameters, read_config, write_config
from seqattn.interop.huggingface.family import Family
from seqattn.interop.huggingface.fields import Fields
from seqattn.models.position_encodings import Sinusoidal
from seqattn.models.transformer import TransformerConfig

_ONCE = {
    "normalize_before": True,
    "normalize_embedding": False,
    "add_final_layer_norm": True,
    "add_bias_logits": False,
    "static_position_embeddings": True,
}
"""Fields of older configs that transformers no longer reads, with the values of the only model that it still has."""


def _read(fields: Fields) -> TransformerConfig:
    fields.require(**_ONCE)
    return read_config(fields, Sinusoidal(interleaved=False), norm_first=True, logits_bias=True)


PEGASUS = Family(
    "pegasus",
    TransformerConfig,
    {**DEFAULTS, **_ONCE},
    _read,
    write_config,
    parameters,
    same=lambda config: TIED,
    ignored=("model.*coder.embed_positions.weight",),
    architecture=lambda config: "PegasusForConditionalGeneration",
)
