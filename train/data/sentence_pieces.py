"""Tokenizers of Marian: a SentencePiece model for each language, and one vocabulary for both."""

import base64
import dataclasses
import json
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

from train.data.pretrained_tokenizer import FILE, are_ids, special_of, special_tokens
from train.data.tokenizer import SpecialTokens, Tokenizer, checked, label

SOURCE, TARGET, VOCABULARY = "source.spm", "target.spm", "vocab.json"
_OF_TARGETS = "target_vocab.json"
_END, _UNKNOWN, _PAD = "</s>", "<unk>", "<pad>"
_FIELDS = {"special", "vocabulary", "source", "target"}


class SentencePieces(Tokenizer):
    """The tokenizer of a Marian model, such as OPUS-MT: it gives the ids that transformers gives.

    A text may start with the language of its target, such as ">>fra<<", if the vocabulary has it. Punctuation is not
    normalized, as in transformers without sacremoses.

    Args:
        vocabulary: the id of each piece.
        source: the SentencePiece model of sources, as bytes of its file.
        target: that of targets.
        special: the ids that decoding needs.

    Raises:
        ValueError: sentencepiece is not installed, a model is damaged, or the vocabulary lacks a special token or has
            an id twice.
    """

    def __init__(self, vocabulary: Mapping[str, int], source: bytes, target: bytes, special: SpecialTokens) -> None:
        self._files = (source, target)
        self._source, self._target = _model(source, SOURCE), _model(target, TARGET)
        self._ids_of, self._pieces = dict(vocabulary), {number: piece for piece, number in vocabulary.items()}
        if len(self._pieces) != len(vocabulary):
            raise ValueError(f"{VOCABULARY} must have each id once")
        for name in (_END, _UNKNOWN, _PAD):
            if name not in vocabulary:
                raise ValueError(f"{VOCABULARY} must have the token {name}")
        self._set_special(special, self._pieces.get)
        self.unknown_id = vocabulary[_UNKNOWN]

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Loads `source.spm`, `target.spm`, `vocab.json` and the special tokens of the model.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, which the message names, or sentencepiece is not installed.
        """
        if (folder / _OF_TARGETS).is_file():
            raise ValueError(f"{folder / _OF_TARGETS}: a vocabulary of its own for targets is one that we lack")
        for name in (SOURCE, TARGET, VOCABULARY):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing, and {FILE} too")
        special = special_of(folder)
        try:
            vocabulary = _vocabulary(json.loads((folder / VOCABULARY).read_text("utf-8")))
            source, target = ((folder / name).read_bytes() for name in (SOURCE, TARGET))
            return cls(vocabulary, source, target, special)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Makes a tokenizer from a text that `to_json` returned.

        Raises:
            ValueError: the text is not such a tokenizer; the message names the rule.
        """
        parsed = json.loads(text)
        if not has_pieces(parsed) or not all(isinstance(parsed[name], str) for name in ("source", "target")):
            raise ValueError(f"it must have the fields {', '.join(sorted(_FIELDS))}, and no others")
        source, target = (base64.b64decode(parsed[name], validate=True) for name in ("source", "target"))
        return cls(_vocabulary(parsed["vocabulary"]), source, target, special_tokens(parsed["special"]))

    def to_json(self) -> str:
        """Returns special tokens, vocabulary and both models, in base64, as JSON; equal tokenizers give equal texts."""
        source, target = (base64.b64encode(file).decode("ascii") for file in self._files)
        parts = {"special": dataclasses.asdict(self.special), "vocabulary": self._ids_of}
        return json.dumps(parts | {"source": source, "target": target}, ensure_ascii=False)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._pieces)

    def encode(self, text: str) -> list[int]:
        """Encodes a source, without the end token."""
        return self._encoded(checked(text), self._source)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Encodes sources, as `encode` does."""
        return [self.encode(text) for text in texts]

    def targets(self, texts: Iterable[str]) -> list[list[int]]:
        """Encodes texts as the model learns to write them: between start and end token."""
        start = [self.start_id, *self.special.first]
        return [[*start, *self._encoded(checked(text), self._target), self.end_id] for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids up to the end token, without special tokens."""
        text = takewhile(lambda number: number not in self.special.end, map(int, ids))
        # The table of the model may be longer than the vocabulary.
        pieces = [self._pieces.get(number, _UNKNOWN) for number in text]
        kept = [piece for piece in pieces if piece not in (_END, _UNKNOWN, _PAD)]
        decoded: str = self._target.decode_pieces(kept)
        return decoded.replace("▁", " ").strip()

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Returns a printable label for each id, including special tokens."""
        return [label(self._piece(int(number)).replace("▁", " ")) for number in ids]

    def _encoded(self, text: str, model: Any) -> list[int]:
        language, _, rest = text.partition("<<")
        # The language of the target is one token of the vocabulary, and no piece of the model.
        given = text.startswith(">>") and "<<" in text
        pieces = [f"{language}<<"] * given + model.encode(rest if given else text, out_type=str)
        return [self._ids_of.get(piece, self.unknown_id) for piece in pieces]

    def _piece(self, number: int) -> str:
        if number not in self._pieces:
            raise ValueError(f"id ({number}) must be 0 to {self.vocab_size - 1}, and one of the vocabulary")
        return self._pieces[number]


def has_pieces(parsed: Any) -> bool:
    """Whether parsed JSON has the fields of `SentencePieces.to_json`."""
    return isinstance(parsed, dict) and parsed.keys() == _FIELDS


def _vocabulary(parsed: Any) -> dict[str, int]:
    if not isinstance(parsed, dict) or not are_ids(list(parsed.values())):
        raise ValueError(f"{VOCABULARY} must map pieces to ids")
    return parsed


def _model(content: bytes, name: str) -> Any:
    try:
        import sentencepiece
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name} needs sentencepiece: pip install 'seqattn[sentencepiece]', or pip install sentencepiece"
        ) from error
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(f"{name} is damaged, or no SentencePiece model") from error
