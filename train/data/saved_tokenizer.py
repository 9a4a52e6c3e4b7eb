"""Loads a tokenizer of either kind: our own, or one of transformers."""

import json
from collections.abc import Iterable

from train.data.pretrained_tokenizer import PretrainedTokenizer, is_pretrained
from train.data.tokenizer import SavedTokenizer, Tokenizer, TokenizerConfig


def from_json(text: str) -> Tokenizer:
    """Makes a tokenizer from a text that `to_json` of either kind returned.

    Raises:
        ValueError: the text is no such tokenizer; the message names the rule.
    """
    return PretrainedTokenizer.from_json(text) if is_pretrained(json.loads(text)) else Tokenizer.from_json(text)


def make(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Trains a tokenizer on texts, or loads the one that the config names.

    Raises:
        FileNotFoundError: a saved tokenizer does not exist.
        ValueError: a saved tokenizer is damaged. The message names the file.
    """
    if not isinstance(config, SavedTokenizer):
        return Tokenizer.train(config, texts)
    if config.path.is_dir():
        return PretrainedTokenizer.from_folder(config.path)
    if not config.path.is_file():
        raise FileNotFoundError(f"--tokenizer.path: there is no file {config.path}")
    try:
        return from_json(config.path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{config.path}: {error}") from error
