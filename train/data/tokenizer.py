"""Text to token ids and back: characters for small tasks, byte-level BPE for everything else.

A tokenizer is its vocabulary (and merges) and nothing else: what happens around them is fixed here, not in its file.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, ClassVar, Self

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from seqattn.checks import check_integer

_TOGETHER = 10_000
"""Texts that are encoded at a time."""
SPECIAL_TOKENS = ("[PAD]", "[START]", "[END]", "[UNK]")


@dataclass(frozen=True)
class Characters:
    """A token for every character that the training texts hold, in the order of Unicode; no other setting."""

    def train(self, texts: Iterable[str]) -> models.WordLevel:
        """The vocabulary of the texts; ValueError where they hold no character."""
        normalize = normalizers.NFC().normalize_str
        characters = sorted({character for text in texts for character in normalize(text)})
        if not characters:
            raise ValueError("a vocabulary of characters needs a text that is not empty")
        vocab = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *characters))}
        return models.WordLevel(vocab, unk_token="[UNK]")


@dataclass(frozen=True)
class ByteLevelBPE:
    """Byte-pair encoding over bytes (Radford et al. 2019): no text is unknown to it, in any script."""

    vocab_size: int = 10_000
    """tokens in all, at least 260: 4 special ones, 256 bytes, and merges"""

    def train(self, texts: Iterable[str]) -> models.BPE:
        """The merges of the most frequent pairs; fewer than asked for where the texts have no more of them."""
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        smallest = len(SPECIAL_TOKENS) + len(alphabet)
        check_integer("vocab_size", self.vocab_size, smallest, hint=": special tokens and bytes")
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        learner = _pipeline(models.BPE(unk_token="[UNK]"))
        learner.train_from_iterator(texts, trainer)
        return learner.model


@dataclass(frozen=True)
class SavedTokenizer:
    """The tokenizer of another run: figures of each token of the two can then be compared."""

    path: Path
    """its tokenizer.json"""

    def train(self, texts: Iterable[str]) -> models.WordLevel | models.BPE:
        """The vocabulary of the file, whatever the texts are."""
        del texts
        if not self.path.is_file():
            raise FileNotFoundError(f"--tokenizer.path: there is no file {self.path}")
        return Tokenizer.load(self.path).model


TokenizerConfig = Characters | ByteLevelBPE | SavedTokenizer


class Tokenizer:
    """Turns texts into lists of ids and back.

    Text is brought to Unicode NFC first: `decode(encode(text))` is the NFC form of any text without unknown
    characters. Special tokens exist as ids only. The text "[END]" is five characters like any others, so no user can
    write an end into a text. NUL is a character like any other; a text with a lone surrogate is a ValueError.

    >>> tokenizer = Tokenizer.train(Characters(), ["abc", "a c"])
    >>> tokenizer.encode("cab?"), tokenizer.decode([7, 5, 6, 2, 5]), tokenizer.tokens([1, 5, 4, 2])
    ([7, 5, 6, 3], 'cab', ['[START]', 'a', '␣', '[END]'])
    """

    pad_id: ClassVar[int] = 0
    start_id: ClassVar[int] = 1
    end_id: ClassVar[int] = 2
    unknown_id: ClassVar[int] = 3

    def __init__(self, model: models.WordLevel | models.BPE):
        self._tokenizer = _pipeline(model)

    @classmethod
    def train(cls, config: TokenizerConfig, texts: Iterable[str]) -> Self:
        """The tokenizer that the texts give; the same texts always give the same one."""
        return cls(config.train(_checked(text) for text in texts))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The tokenizer of a file that `save` wrote; ValueError, naming file and rule, where it is not one."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The tokenizer of a text that `to_json` returned; ValueError, naming the rule, where it is not one."""
        parsed = json.loads(text)
        tokenizer = cls(_model(parsed))
        own = json.loads(tokenizer.to_json())
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if _kind(parsed.get(part)) != _kind(own[part]):
                raise ValueError(f"its {part} ({_kind(parsed.get(part))}) must be {_kind(own[part])}")
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Writes `to_json` to a file, in UTF-8."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The tokenizer in the format of the tokenizers package; equal tokenizers give equal texts."""
        return self._tokenizer.to_str()

    @property
    def model(self) -> models.WordLevel | models.BPE:
        """The vocabulary, and the merges where it has them."""
        return self._tokenizer.model

    @property
    def vocab_size(self) -> int:
        """Tokens in all, special ones included; ids are 0 to vocab_size - 1."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end; no id for the empty text."""
        return self._tokenizer.encode(_checked(text)).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of several texts, unpadded: `encode` of each, on all cores."""
        found: list[list[int]] = []
        rest = iter(texts)
        # What the tokenizers package gives of a text takes a hundred times its ids.
        while some := [_checked(text) for text in islice(rest, _TOGETHER)]:
            found += [encoding.ids for encoding in self._tokenizer.encode_batch(some)]
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first end, without start and padding; unknown tokens show as "[UNK]"."""
        text = takewhile(lambda number: number != self.end_id, ids)
        return self._text([number for number in text if number not in (self.pad_id, self.start_id)])

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """A label for every id, special ones included: its text, with "␣" for a space and escapes for the invisible.

        A piece that is a part of a character's bytes shows as "�".
        """
        return [_label(self._text([number])) for number in ids]

    def _text(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decoder.decode([self._piece(int(number)) for number in ids])

    def _piece(self, number: int) -> str:
        piece = self._tokenizer.id_to_token(number) if number >= 0 else None
        if piece is None:
            raise ValueError(f"id ({number}) must be 0 to {self.vocab_size - 1}")
        return piece


def _pipeline(model: models.WordLevel | models.BPE) -> tokenizers.Tokenizer:
    """Everything around a vocabulary. No special token is registered: so none is ever looked for in a text."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    if isinstance(model, models.BPE):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _model(parsed: Any) -> models.WordLevel | models.BPE:
    """The model of a parsed file: only its vocabulary and merges are taken over, and only if they are sound."""
    model = parsed.get("model") if isinstance(parsed, dict) else None
    kind = _kind(model)
    if model is None or kind not in ("WordLevel", "BPE"):
        raise ValueError(f"its model ({kind}) must be a WordLevel or a BPE")
    if parsed.get("added_tokens"):
        raise ValueError(f"it must have no added tokens, but has {len(parsed['added_tokens'])}")
    vocab = _sound_vocab(model.get("vocab"))
    if kind == "WordLevel":
        return models.WordLevel(vocab, unk_token="[UNK]")
    return models.BPE(vocab, _sound_merges(model.get("merges"), vocab), unk_token="[UNK]")


def _kind(part: Any) -> str | None:
    return part.get("type") if isinstance(part, dict) else None


def _sound_vocab(vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
        raise ValueError("its vocabulary must map tokens to whole numbers")
    tokens: dict[int, str] = {}
    for token, number in vocab.items():
        if not 0 <= number < len(vocab):
            raise ValueError(
                f"id {number} of {token!r} must be 0 to {len(vocab) - 1}, as there are {len(vocab)} tokens"
            )
        if number in tokens:
            raise ValueError(f"id {number} must belong to one token, not to {tokens[number]!r} and {token!r}")
        tokens[number] = token
    for number, token in enumerate(SPECIAL_TOKENS):
        if vocab.get(token) != number:
            raise ValueError(f"{token} must have id {number}, not {vocab.get(token)}")
    return vocab


def _sound_merges(merges: Any, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise ValueError("its merges must be a list of pairs of tokens")
    for merge in merges:
        if not (isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)):
            raise ValueError(f"merge {merge!r} must be a pair of tokens")
        if not vocab.keys() >= {*merge, "".join(merge)}:
            raise ValueError(f"merge {merge!r} must join two tokens of the vocabulary to a third one")
    return [(first, second) for first, second in merges]


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"character {error.start} (U+{code:04X}) is a lone surrogate, which no text holds") from error
    return text


def _label(text: str) -> str:
    shown = (character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return "".join(shown).replace(" ", "␣")
