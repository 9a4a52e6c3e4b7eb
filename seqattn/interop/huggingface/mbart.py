"""mBART (Liu 2020): BART with norms before each sublayer."""

from seqattn.interop.huggingface.bart import DEFAULTS, OPTIONS, older, parameters, read_config, write_config
from seqattn.interop.huggingface.family import Family
from seqattn.interop.huggingface.fields import Fields
from seqattn.models.position_encodings import Learned
from seqattn.models.transformer import TransformerConfig

_OLDER = older(norm_first=True, norm_embedding=True, sines=False)


def _read(fields: Fields) -> TransformerConfig:
    fields.require(**_OLDER)
    positions = Learned(fields.size("max_position_embeddings"))
    return read_config(fields, positions, norm_first=True, norm_embedding=True, logits_bias=True)


MBART = Family(
    "mbart",
    TransformerConfig,
    {**DEFAULTS, **_OLDER},
    _read,
    write_config,
    parameters,
    **OPTIONS,
    architecture=lambda config: "MBartForConditionalGeneration",
)
