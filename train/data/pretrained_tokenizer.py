"""Tokenizers of Hugging Face transformers: the pipeline of their `tokenizer.json`, and their special tokens."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import tokenizers

from train.data.json_files import read_object
from train.data.tokenizer import SpecialTokens, Tokenizer, checked, label

FILE = "tokenizer.json"
_OTHER_FILES = ("spiece.model", "source.spm", "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt", "vocab.json")


class PretrainedTokenizer(Tokenizer):
    """The tokenizer of a model of transformers: it gives the ids that transformers gives.

    The pipeline is that of the file, with its special tokens: unlike in our own tokenizers, the text "</s>" is the
    special token of this name. Padding and truncation of the file are left out.

    Args:
        text: the content of `tokenizer.json`.
        special: the ids that decoding needs.

    Raises:
        ValueError: the text is no tokenizer, or has no token with an id of `special`. The message names the rule.
    """

    def __init__(self, text: str, special: SpecialTokens) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"it is no tokenizer of the tokenizers package: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._set_special(special, self._tokenizer.id_to_token)
        decoder = json.loads(self._tokenizer.to_str()).get("decoder") or {}
        self._of_bytes = "ByteLevel" in json.dumps(decoder)

    @classmethod
    def from_folder(cls, folder: Path, *, decodes: bool = True) -> Self:
        """Loads the tokenizer of a folder of transformers.

        Args:
            folder: the folder, with `tokenizer.json`, `config.json` and perhaps `generation_config.json`.
            decodes: whether the model generates text; an encoder needs no start and end token.

        Raises:
            FileNotFoundError: `tokenizer.json` is missing.
            ValueError: the tokenizer is damaged, or no id of a special token is known. The message names the file.
        """
        path = folder / FILE
        if not path.is_file():
            others = [name for name in _OTHER_FILES if (folder / name).is_file()]
            hint = (
                f': convert {others[0]} where transformers is installed, with AutoTokenizer.from_pretrained("FOLDER")'
                '.save_pretrained("NEW_FOLDER")'
                if others
                else ""
            )
            raise FileNotFoundError(f"{path} is missing{hint}")
        special = special_of(folder) if decodes else _of_encoder(folder)
        try:
            return cls(path.read_text("utf-8"), special)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Makes a tokenizer from a text that `to_json` returned.

        Raises:
            ValueError: the text is not such a tokenizer; the message names the rule.
        """
        parsed = json.loads(text)
        if not is_pretrained(parsed):
            raise ValueError("it must have the fields special and tokenizer, and no others")
        return cls(json.dumps(parsed["tokenizer"], ensure_ascii=False), special_tokens(parsed["special"]))

    def to_json(self) -> str:
        """Returns special tokens and pipeline as JSON; equal tokenizers give equal texts."""
        parts = {"special": dataclasses.asdict(self.special), "tokenizer": json.loads(self._tokenizer.to_str())}
        return json.dumps(parts, ensure_ascii=False)

    def for_languages(self, source: str | None = None, target: str | None = None) -> Self:
        """Returns this tokenizer for another language of the sources, of the targets, or of both.

        Args:
            source: the token of the language of the sources, such as "deu_Latn"; it takes the place of the token that
                the file puts beside each text.
            target: the token of the language of the targets, which every target then starts with.

        Raises:
            ValueError: there is no such token, or the file puts no token of a language beside a text.
        """
        for name in (source, target):
            if name is not None and self._tokenizer.token_to_id(name) is None:
                raise ValueError(f"language ({name}) must be a token of the tokenizer, such as deu_Latn or de_DE")
        special, text = self.special, self._tokenizer.to_str()
        if target is not None and (number := self._tokenizer.token_to_id(target)) is not None:
            special = dataclasses.replace(special, first=(number,))
        return type(self)(text if source is None else self._reading(source), special)

    def _reading(self, language: str) -> str:
        """The pipeline with another token beside each text."""
        beside = [number for number in self._tokenizer.encode("").ids if number not in self.special.end]
        if len(beside) != 1:
            names = [self._tokenizer.id_to_token(number) for number in beside]
            raise ValueError(
                f"language of the source ({language}): the tokenizer must put one token of a language beside each "
                f"text, but puts {', '.join(map(repr, names)) or 'none'}"
            )
        old, parsed = self._tokenizer.id_to_token(beside[0]), json.loads(self._tokenizer.to_str())
        token = {"id": language, "ids": [self._tokenizer.token_to_id(language)], "tokens": [language]}
        for part in _templates(parsed.get("post_processor")):
            part["special_tokens"] = {name: each for name, each in part["special_tokens"].items() if name != old}
            part["special_tokens"][language] = token
            for piece in (*part["single"], *part["pair"]):
                if piece.get("SpecialToken", {}).get("id") == old:
                    piece["SpecialToken"]["id"] = language
        return json.dumps(parsed, ensure_ascii=False)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Encodes a text, without special tokens around it."""
        return self._tokenizer.encode(checked(text), add_special_tokens=False).ids

    def sources(self, texts: Iterable[str]) -> list[list[int]]:
        """Encodes texts as an encoder-decoder reads them: with the special tokens that the file puts around a text."""
        return self.inputs(texts)

    def targets(self, texts: Iterable[str]) -> list[list[int]]:
        """Encodes texts as an encoder-decoder learns to write them: between start and end token."""
        start = [self.start_id, *self.special.first]
        return [[*start, *ids, self.end_id] for ids in self.encode_batch(texts)]

    def prompts(self, texts: Iterable[str]) -> list[list[int]]:
        """Encodes texts as a language model reads them before it goes on; never without ids.

        The special tokens are those of the file: Llama's starts with its start token, GPT-2's does not.
        """
        return [ids or [self.start_id] for ids in self.inputs(texts)]

    def inputs(self, texts: Iterable[str]) -> list[list[int]]:
        """Encodes texts as an encoder reads them: with the special tokens that the file puts around a text."""
        return self._ids(texts, special=True)

    def cut(self, texts: Iterable[str], length: int) -> list[list[int]]:
        """Encodes texts as `inputs` does, without the tokens that make them longer than `length`; special tokens stay.

        Raises:
            ValueError: `length` leaves no room beside the special tokens.
        """
        around = len(self.inputs([""])[0])
        if length <= around:
            raise ValueError(f"a length of {length} leaves no room beside {around} special tokens")
        self._tokenizer.enable_truncation(length)
        try:
            return self.inputs(texts)
        finally:
            self._tokenizer.no_truncation()

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids up to the first end token, without special tokens."""
        return self._tokenizer.decode(self._before_end(ids), skip_special_tokens=True)

    def continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Decodes ids that go on with others: Llama's first token of a text has no space, but one in a text has.

        Args:
            before: the ids of the text before, such as `prompts` returns.
            ids: the ids behind it, up to the first end token.
        """
        text = self._tokenizer.decode([*before], skip_special_tokens=True)
        whole = self._tokenizer.decode([*before, *self._before_end(ids)], skip_special_tokens=True)
        # A decoder may change the end of a text that goes on.
        return whole.removeprefix(text) if whole.startswith(text) else self.decode(ids)

    def _before_end(self, ids: Iterable[int]) -> list[int]:
        """The ids before the first end token. One that only the model has decodes to nothing, as in transformers."""
        return [int(number) for number in takewhile(lambda number: number not in self.special.end, ids)]

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Returns a printable label for each id, including special tokens."""
        pieces = [(int(number), self._piece(int(number))) for number in ids]
        if self._of_bytes:
            return [label(self._tokenizer.decode([number], skip_special_tokens=False)) for number, _ in pieces]
        return [label(piece.replace("▁", " ")) for _, piece in pieces]


def is_pretrained(parsed: Any) -> bool:
    """Whether parsed JSON has the fields of `PretrainedTokenizer.to_json`."""
    return (
        isinstance(parsed, dict)
        and parsed.keys() == {"special", "tokenizer"}
        and all(isinstance(part, dict) for part in parsed.values())
    )


def special_tokens(fields: Any) -> SpecialTokens:
    """Makes special tokens from their fields in JSON.

    Raises:
        ValueError: the fields are others, or are no ids.
    """
    if not isinstance(fields, dict):
        raise ValueError("its special tokens must be a JSON object")
    end, first = fields.get("end"), fields.get("first")
    lists = isinstance(end, list) and isinstance(first, list)
    if fields.keys() != {"start", "pad", "end", "first"} or not lists:
        raise ValueError("its special tokens must be start, pad and the lists end and first")
    assert isinstance(end, list)
    assert isinstance(first, list)
    if not are_ids([fields["start"], fields["pad"], *end, *first]):
        raise ValueError(f"its special tokens must be ids, got {dict(fields)}")
    return SpecialTokens(tuple(end), fields["start"], fields["pad"], tuple(first))


def are_ids(numbers: list[Any]) -> bool:
    """Whether all are integers of at least 0."""
    return all(type(number) is int and number >= 0 for number in numbers)


def _templates(part: Any) -> list[dict[str, Any]]:
    """The templates of a post-processor, which may be a sequence of several."""
    if not isinstance(part, dict):
        return []
    if part.get("type") == "TemplateProcessing":
        return [part]
    return [found for each in part.get("processors", ()) for found in _templates(each)]


def special_of(folder: Path) -> SpecialTokens:
    """Reads the special tokens of a model that generates text. `generation_config.json` comes before `config.json`.

    Raises:
        ValueError: there is no end token, or a token is no id.
    """
    fields: dict[str, Any] = {}
    path = folder / "config.json"
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            path = folder / name
            # transformers forces only what the latter says, if there is one.
            fields.pop("forced_bos_token_id", None)
            parsed = read_object(path)
            fields |= {key: value for key, value in parsed.items() if key.endswith("_token_id") and value is not None}
    end = fields.get("eos_token_id")
    named = end if isinstance(end, list) else [] if end is None else [end]
    if not named or not are_ids(named):
        raise ValueError(f"{path}: eos_token_id ({end}) must be the id of the end token, or a list of such ids")
    ends = tuple(dict.fromkeys(named))
    starts = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    start = next((fields[name] for name in starts if name in fields), ends[0])
    pad, first = fields.get("pad_token_id", ends[0]), fields.get("forced_bos_token_id")
    firsts = () if first is None else (first,)
    if not are_ids([start, pad, *firsts]):
        raise ValueError(
            f"{path}: {starts[0]}, pad_token_id and forced_bos_token_id must be ids, got {start}, {pad}, {first}"
        )
    return SpecialTokens(ends, start, pad, firsts)


def _of_encoder(folder: Path) -> SpecialTokens:
    """Special tokens for a model that generates no text; only padding is ever used."""
    found = read_object(folder / "config.json").get("pad_token_id")
    pad: int = found if isinstance(found, int) and are_ids([found]) else 0
    return SpecialTokens((pad,), pad, pad)
