"""Pegasus (Zhang 2020): norms before each sublayer, and sinusoidal positions with all sines first."""

from seqattn.interop.huggingface.bart import DEFAULTS, OPTIONS, older, parameters, read_config, write_config
from seqattn.interop.huggingface.family import Family
from seqattn.interop.huggingface.fields import Fields
from seqattn.models.position_encodings import Sinusoidal
from seqattn.models.transformer import TransformerConfig

_OLDER = older(norm_first=True, norm_embedding=False, sines=True)


def _read(fields: Fields) -> TransformerConfig:
    fields.require(**_OLDER)
    return read_config(fields, Sinusoidal(interleaved=False), norm_first=True, logits_bias=True)


PEGASUS = Family(
    "pegasus",
    TransformerConfig,
    {**DEFAULTS, **_OLDER},
    _read,
    write_config,
    parameters,
    **OPTIONS,
    ignored=("model.*coder.embed_positions.weight",),
    architecture=lambda config: "PegasusForConditionalGeneration",
)
