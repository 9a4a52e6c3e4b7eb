"""Loads a tokenizer of any kind: our own, or one of transformers."""

import json
from collections.abc import Iterable
from pathlib import Path

from train.data.pretrained_tokenizer import FILE, PretrainedTokenizer, is_pretrained
from train.data.sentence_pieces import SOURCE, SentencePieces, has_pieces
from train.data.tokenizer import SavedTokenizer, Tokenizer, TokenizerConfig


def from_json(text: str) -> Tokenizer:
    """Makes a tokenizer from a text that `to_json` of any kind returned.

    Raises:
        ValueError: the text is no such tokenizer; the message names the rule.
    """
    parsed = json.loads(text)
    if has_pieces(parsed):
        return SentencePieces.from_json(text)
    return PretrainedTokenizer.from_json(text) if is_pretrained(parsed) else Tokenizer.from_json(text)


def from_folder(folder: Path, *, decodes: bool = True) -> Tokenizer:
    """Loads the tokenizer of a folder of transformers: `tokenizer.json`, or the SentencePiece models of Marian.

    Args:
        folder: the folder.
        decodes: as in `PretrainedTokenizer.from_folder`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, which the message names; or the folder has SentencePiece models, and
            sentencepiece is not installed.
    """
    if not (folder / FILE).is_file() and (folder / SOURCE).is_file():
        return SentencePieces.from_folder(folder)
    return PretrainedTokenizer.from_folder(folder, decodes=decodes)


def make(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Trains a tokenizer on texts, or loads the one that the config names.

    Raises:
        FileNotFoundError: a saved tokenizer does not exist.
        ValueError: a saved tokenizer is damaged. The message names the file.
    """
    if not isinstance(config, SavedTokenizer):
        return Tokenizer.train(config, texts)
    if config.path.is_dir():
        return from_folder(config.path)
    if not config.path.is_file():
        raise FileNotFoundError(f"--tokenizer.path: there is no file {config.path}")
    try:
        return from_json(config.path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{config.path}: {error}") from error
