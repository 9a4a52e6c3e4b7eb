"""MarianMT (OPUS-MT: Tiedemann 2020): the Transformer of Vaswani 2017 with all sines of positions first."""

from typing import Any

from seqattn.checks import check_even
from seqattn.interop.huggingface.bart import DEFAULTS, OPTIONS, older, parameters, read_config, write_config
from seqattn.interop.huggingface.family import Family
from seqattn.interop.huggingface.fields import Fields
from seqattn.models.position_encodings import Sinusoidal
from seqattn.models.transformer import TransformerConfig

_OLDER = older(norm_first=False, norm_embedding=False, sines=True)


def _read(fields: Fields) -> TransformerConfig:
    fields.require(share_encoder_decoder_embeddings=True, **_OLDER)
    check_even("d_model", fields.size("d_model"), ": half of each vector of positions are sines")
    if fields["decoder_vocab_size"] not in (None, fields["vocab_size"]):
        raise NotImplementedError(
            f"decoder_vocab_size ({fields['decoder_vocab_size']}) must be vocab_size ({fields['vocab_size']})"
        )
    return read_config(fields, Sinusoidal(interleaved=False), norm_first=False, logits_bias=True)


def _write(config: TransformerConfig) -> dict[str, Any]:
    # As in OPUS-MT, the last token is padding, and starts each target. Larger numbers than `vocab_size` are refused.
    last = config.vocab_size - 1
    return write_config(config) | {"pad_token_id": last, "decoder_start_token_id": last}


MARIAN = Family(
    "marian",
    TransformerConfig,
    {**DEFAULTS, **_OLDER, "vocab_size": 58_101, "decoder_vocab_size": None, "share_encoder_decoder_embeddings": True},
    _read,
    _write,
    parameters,
    **OPTIONS,
    ignored=("model.*coder.embed_positions.weight",),
    architecture=lambda config: "MarianMTModel",
)
