"""M2M-100 (Fan 2020) and NLLB (NLLB Team 2022): many languages, sinusoidal positions in the form of tensor2tensor."""

from seqattn.interop.huggingface.bart import DEFAULTS, OPTIONS, parameters, read_config, write_config
from seqattn.interop.huggingface.family import Family
from seqattn.interop.huggingface.fields import Fields
from seqattn.models.position_encodings import Sinusoidal
from seqattn.models.transformer import TransformerConfig


def _read(fields: Fields) -> TransformerConfig:
    # The number of the padding token is also an offset of positions.
    first = fields.size("pad_token_id", 0) + 1
    positions = Sinusoidal(interleaved=False, last=True, first=first)
    return read_config(fields, positions, norm_first=True)


def _write(config: TransformerConfig) -> dict[str, object]:
    first = config.positions.first if isinstance(config.positions, Sinusoidal) else 2
    return write_config(config) | {"pad_token_id": first - 1}


M2M_100 = Family(
    "m2m_100",
    TransformerConfig,
    {
        **DEFAULTS,
        "vocab_size": 128_112,
        "activation_function": "relu",
        "attention_dropout": 0.1,
        "scale_embedding": True,
        "pad_token_id": 1,
    },
    _read,
    _write,
    parameters,
    **OPTIONS,
    ignored=("model.*coder.embed_positions.weight*",),
    architecture=lambda config: "M2M100ForConditionalGeneration",
)
