"""Tokenizers: characters for small tasks, byte-level BPE for all others.

A tokenizer is its vocabulary (and merges) only. Normalization, splitting and decoding are fixed in this module, so a
tokenizer file cannot change them.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from seqattn.checks import check_integer

_TOGETHER = 10_000
"""Number of texts that are encoded at a time."""
SPECIAL_TOKENS = ("[PAD]", "[START]", "[END]", "[UNK]")


@dataclass(frozen=True)
class Characters:
    """One token for each character of the training texts, in the order of Unicode; there are no settings.

    Sequences are long, but labels of characters align with tokens, and outputs are spelled letter by letter.
    """

    def train(self, texts: Iterable[str]) -> models.WordLevel:
        """Collects the vocabulary of the texts.

        Raises:
            ValueError: the texts are empty.
        """
        normalize = normalizers.NFC().normalize_str
        characters = sorted({character for text in texts for character in normalize(text)})
        if not characters:
            raise ValueError("a vocabulary of characters needs a text that is not empty")
        vocab = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *characters))}
        return models.WordLevel(vocab, unk_token="[UNK]")


@dataclass(frozen=True)
class ByteLevelBPE:
    """Byte-pair encoding over bytes (Radford et al. 2019): it encodes any text in any script without unknown tokens.

    Training is deterministic, which WordPiece and Unigram of the tokenizers package are not.
    """

    vocab_size: int = 10_000
    """number of tokens, at least 260: 4 special tokens, 256 bytes, and merges"""

    def train(self, texts: Iterable[str]) -> models.BPE:
        """Learns the merges of the most frequent pairs; the vocabulary is smaller if the texts have too few pairs.

        Raises:
            ValueError: `vocab_size` is below 260.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        smallest = len(SPECIAL_TOKENS) + len(alphabet)
        check_integer("vocab_size", self.vocab_size, smallest, hint=": special tokens and bytes")
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        # All bytes are in the vocabulary, so no text needs [UNK]. It is set because, without an unknown token, the
        # package drops unknown symbols and merges their neighbors (findings/tokenizers-bpe-joins-neighbours.sh).
        learner = _pipeline(models.BPE(unk_token="[UNK]"))
        learner.train_from_iterator(texts, trainer)
        return learner.model


@dataclass(frozen=True)
class SavedTokenizer:
    """The tokenizer of another run, or of transformers; the losses per token of both runs can then be compared."""

    path: Path
    """path of the tokenizer.json of the other run, or a folder of Hugging Face transformers"""


TokenizerConfig = Characters | ByteLevelBPE | SavedTokenizer


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that decoding needs.

    Attributes:
        end: the ids that end a text; the first one is written behind targets.
        start: the id that a decoder reads first; for a language model, what it reads if a text has no tokens.
        pad: the id behind the end.
        first: ids that every target starts with, such as that of its language.
    """

    end: tuple[int, ...]
    start: int
    pad: int
    first: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.end:
            raise ValueError("a tokenizer needs at least one id that ends a text")


class Tokenizer:
    """Encodes texts as lists of ids, and decodes ids.

    Texts are brought to Unicode NFC first, so `decode(encode(text))` is the NFC form of any text without unknown
    characters. Special tokens exist as ids only: the text "[END]" is five ordinary characters, and no user can write an
    end token into a text. NUL is an ordinary character. A text with a lone surrogate raises ValueError.

    Args:
        model: the vocabulary, with the merges for BPE.

    >>> tokenizer = Tokenizer.train(Characters(), ["abc", "a c"])
    >>> tokenizer.encode("cab?"), tokenizer.decode([7, 5, 6, 2, 5]), tokenizer.tokens([1, 5, 4, 2])
    ([7, 5, 6, 3], 'cab', ['[START]', 'a', '␣', '[END]'])
    """

    special = SpecialTokens(end=(2,), start=1, pad=0)
    pad_id: int = 0
    start_id: int = 1
    end_id: int = 2
    unknown_id: int = 3

    def __init__(self, model: models.WordLevel | models.BPE):
        self._tokenizer = _pipeline(model)

    @classmethod
    def train(cls, config: Characters | ByteLevelBPE, texts: Iterable[str]) -> Self:
        """Trains a tokenizer on texts; equal texts always give equal tokenizers."""
        return cls(config.train(checked(text) for text in texts))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Loads a tokenizer from a file that `save` wrote.

        Raises:
            ValueError: the file is not such a tokenizer; the message names the file and the rule.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Makes a tokenizer from a text that `to_json` returned.

        Raises:
            ValueError: the text is not such a tokenizer; the message names the rule.
        """
        parsed = json.loads(text)
        tokenizer = cls(_model(parsed))
        # A file with another pipeline is refused, as its ids would mean other texts here.
        own = json.loads(tokenizer.to_json())
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if _kind(parsed.get(part)) != _kind(own[part]):
                raise ValueError(f"its {part} ({_kind(parsed.get(part))}) must be {_kind(own[part])}")
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Writes `to_json` to a file, in UTF-8."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """Returns the tokenizer in the format of the tokenizers package; equal tokenizers give equal texts."""
        return self._tokenizer.to_str()

    @property
    def model(self) -> models.WordLevel | models.BPE:
        """The vocabulary, with the merges for BPE."""
        return self._tokenizer.model

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including special ones; ids are 0 to vocab_size - 1."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Encodes a text, without start and end tokens; the empty text has no ids."""
        return self._tokenizer.encode(checked(text)).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Encodes several texts on all cores, as `encode` does; returns the ids of each, unpadded."""
        return self._ids(texts, special=False)

    def _ids(self, texts: Iterable[str], *, special: bool) -> list[list[int]]:
        """Encodes texts, with the special tokens that the pipeline puts around a text if `special`."""
        found: list[list[int]] = []
        rest = iter(texts)
        # In pieces, as an encoding of the tokenizers package needs a hundred times the memory of its ids.
        while some := [checked(text) for text in islice(rest, _TOGETHER)]:
            found += [encoding.ids for encoding in self._tokenizer.encode_batch(some, add_special_tokens=special)]
        return found

    def _set_special(self, special: SpecialTokens, token_of: Callable[[int], str | None]) -> None:
        """Takes other special tokens than our own.

        Raises:
            ValueError: there is no token with one of their ids.
        """
        several = {"end": special.end, "first": special.first, "start": (special.start,), "pad": (special.pad,)}
        for name, number in ((name, number) for name, numbers in several.items() for number in numbers):
            if token_of(number) is None:
                raise ValueError(f"it has no token {number}, the {name} token of the model")
        if special.pad == special.end[0]:
            # Padding behind the end is never read, but a search must tell it from the end.
            special = replace(special, pad=int(special.pad == 0))
        self.special = special
        self.start_id, self.end_id, self.pad_id = special.start, special.end[0], special.pad

    def sources(self, texts: Iterable[str]) -> list[list[int]]:
        """Encodes texts as an encoder-decoder reads them: with the end token."""
        return [[*ids, self.end_id] for ids in self.encode_batch(texts)]

    def targets(self, texts: Iterable[str]) -> list[list[int]]:
        """Encodes texts as an encoder-decoder learns to write them: between start and end token."""
        return [[self.start_id, *ids, self.end_id] for ids in self.encode_batch(texts)]

    def prompts(self, texts: Iterable[str]) -> list[list[int]]:
        """Encodes texts as a language model reads them before it goes on: with the start token; never without ids."""
        return [[self.start_id, *ids] for ids in self.encode_batch(texts)]

    def inputs(self, texts: Iterable[str]) -> list[list[int]]:
        """Encodes texts as an encoder reads them: without special tokens."""
        return self.encode_batch(texts)

    def cut(self, texts: Iterable[str], length: int) -> list[list[int]]:
        """Encodes texts as `inputs` does, and cuts what is longer than `length` ids."""
        return [ids[:length] for ids in self.inputs(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids up to the first end token, without start and padding tokens; an unknown token gives "[UNK]"."""
        text = takewhile(lambda number: number != self.end_id, ids)
        return self._text([number for number in text if number not in (self.pad_id, self.start_id)])

    def continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Decodes ids that go on with the ids `before`, which change nothing here; see `PretrainedTokenizer`."""
        del before
        return self.decode(ids)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Returns a printable label for each id, including special tokens.

        A label is the text of the token, with "␣" for a space and escapes for invisible characters. A token that is
        only a part of the bytes of a character gives "�".
        """
        return [label(self._text([number])) for number in ids]

    def _text(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decoder.decode([self._piece(int(number)) for number in ids])

    def _piece(self, number: int) -> str:
        piece = self._tokenizer.id_to_token(number) if number >= 0 else None
        if piece is None:
            raise ValueError(f"id ({number}) must be 0 to {self.vocab_size - 1}")
        return piece


def _pipeline(model: models.WordLevel | models.BPE) -> tokenizers.Tokenizer:
    """Adds normalizer, pre-tokenizer and decoder to a vocabulary.

    No special token is registered, so the package never looks for one in a text.
    """
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    if isinstance(model, models.BPE):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        # `.` would not match a line end.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _model(parsed: Any) -> models.WordLevel | models.BPE:
    """Makes the model of a parsed file from its vocabulary and merges only, after checking both.

    The tokenizers package itself accepts duplicate ids and ids out of range.
    """
    model = parsed.get("model") if isinstance(parsed, dict) else None
    kind = _kind(model)
    if model is None or kind not in ("WordLevel", "BPE"):
        raise ValueError(f"its model ({kind}) must be a WordLevel or a BPE")
    if parsed.get("added_tokens"):
        raise ValueError(f"it must not have added tokens, but has {len(parsed['added_tokens'])}")
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
                f"id {number} of {token!r} must be 0 to {len(vocab) - 1}, because there are {len(vocab)} tokens"
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


def checked(text: str) -> str:
    """Returns the text.

    Raises:
        ValueError: it has a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"character {error.start} (U+{code:04X}) is a lone surrogate: not allowed in text") from error
    return text


def label(text: str) -> str:
    """Returns a text with "␣" for spaces and escapes for invisible characters."""
    shown = (character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return "".join(shown).replace(" ", "␣")
