"""Small folders of transformers with a tokenizer of words, for the configs of `tests.huggingface_models`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.numpy
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from tests.huggingface_models import CONFIGS, arrays_of

WORDS = ("one", "two", "three", "four", "five")
SPECIAL = {
    "bart": ("<s>", "<pad>", "</s>", "<unk>"),
    "t5": ("<pad>", "</s>", "<unk>"),
    "gpt2": ("<unk>", "<s>", "<|endoftext|>"),
    "llama": ("<unk>", "<s>", "</s>"),
    "mbart": ("<s>", "<pad>", "</s>", "<unk>", "en_XX", "de_DE"),
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
}
"""The special tokens of each family, in the order of their ids."""
AROUND = {
    "bart": "<s> $A </s>",
    "t5": "$A </s>",
    "gpt2": "$A",
    "llama": "<s> $A",
    "mbart": "en_XX $A </s>",
    "bert": "[CLS] $A [SEP]",
}
"""What the tokenizer of each family puts around a text."""


def tokenizer_of(family: str, words: Sequence[str] = WORDS) -> tokenizers.Tokenizer:
    """A tokenizer of words with padding and truncation, which transformers writes, too."""
    special = SPECIAL[family]
    unknown = next(token for token in special if "unk" in token.lower())
    vocabulary = {token: number for number, token in enumerate((*special, *words))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    # Metaspace marks the start of a word in its token.
    tokenizer.model = models.WordLevel(
        {token if token in special else f"▁{token}": number for token, number in vocabulary.items()}, unk_token=unknown
    )
    tokenizer.decoder = decoders.Metaspace()
    around = [(token, vocabulary[token]) for token in AROUND[family].split() if token != "$A"]
    pair = f"{AROUND[family]} $B"
    tokenizer.post_processor = processors.TemplateProcessing(AROUND[family], pair=pair, special_tokens=around)
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(3)
    return tokenizer


def write(
    folder: Path, name: str, *, family: str | None = None, generation: Mapping[str, Any] | None = None, **fields: Any
) -> Path:
    """Writes config, arrays, tokenizer and perhaps `generation_config.json`; returns the folder.

    Args:
        folder: the folder to make.
        name: the config of `CONFIGS`.
        family: the tokenizer, by its name in `SPECIAL`; by default that of the config's family.
        generation: the content of `generation_config.json`.
        fields: fields of the config to set.
    """
    folder.mkdir(parents=True)
    config = CONFIGS[name] | fields
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    safetensors.numpy.save_file(arrays_of(config), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer_of(family or config["model_type"]).save(str(folder / "tokenizer.json"))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    return folder
