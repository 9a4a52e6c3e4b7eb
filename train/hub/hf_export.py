"""The files beside config and parameters that transformers needs to generate text: tokenizer and special tokens."""

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from seqattn.models import EncoderConfig, LanguageModelConfig
from train.data.pretrained_tokenizer import PretrainedTokenizer
from train.data.sentence_pieces import SentencePieces
from train.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from train.hub.generation_config import GENERATION

_LONGEST = 512
"""Maximum number of tokens of an output by default; that of transformers is 20."""


def files_of(tokenizer: Tokenizer, model: Any) -> dict[str, str]:
    """Returns the content of the files by name.

    Args:
        tokenizer: the tokenizer of the model, our own or one of transformers.
        model: the model, which decides what the tokenizer puts around a text.

    Raises:
        ValueError: the tokenizer has SentencePiece models, which only `--like` copies.
    """
    pipeline = _pipeline(tokenizer, model.config)
    special = tokenizer.special
    pad = _pad(tokenizer, pipeline)
    names = {"pad_token": pad, "eos_token": special.end[0], "bos_token": special.start}
    if not isinstance(tokenizer, PretrainedTokenizer):
        names["unk_token"] = tokenizer.unknown_id
    config: dict[str, Any] = {name: pipeline.id_to_token(number) for name, number in names.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": pipeline.to_str(), "tokenizer_config.json": _text(config)}
    if isinstance(model.config, EncoderConfig):
        return files
    room = model.room(0)
    fields: dict[str, Any] = {
        "bos_token_id": special.start,
        "eos_token_id": special.end[0] if len(special.end) == 1 else list(special.end),
        "pad_token_id": pad,
        "max_length": _LONGEST if room is None else min(_LONGEST, room),
    }
    if not isinstance(model.config, LanguageModelConfig):
        fields["decoder_start_token_id"] = special.start
    if len(special.first) == 1:
        fields["forced_bos_token_id"] = special.first[0]
    return files | {GENERATION: _text(fields)}


def _pad(tokenizer: Tokenizer, pipeline: tokenizers.Tokenizer) -> int:
    """The padding token, or the end token where padding is an ordinary token: transformers would leave it out."""
    special = tokenizer.special
    added = pipeline.get_added_tokens_decoder().get(special.pad)
    return special.pad if added is not None and added.special else special.end[0]


def _pipeline(tokenizer: Tokenizer, config: Any) -> tokenizers.Tokenizer:
    """The pipeline, which puts special tokens around a text as our commands do."""
    if isinstance(tokenizer, SentencePieces):
        raise ValueError("--family: the tokenizer has SentencePiece models: give their folder, --like FOLDER")
    if isinstance(tokenizer, PretrainedTokenizer):
        return tokenizers.Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_json())["tokenizer"]))
    pipeline = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    pipeline.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    start, end = SPECIAL_TOKENS[tokenizer.start_id], SPECIAL_TOKENS[tokenizer.end_id]
    around = f"{start} $A" if isinstance(config, LanguageModelConfig) else f"$A {end}"
    if not isinstance(config, EncoderConfig):
        ids = [(start, tokenizer.start_id), (end, tokenizer.end_id)]
        pipeline.post_processor = TemplateProcessing(single=around, pair=f"{around} $B", special_tokens=ids)
    return pipeline


def _text(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
