"""Translation: parallel text from local files or from the Hugging Face hub."""

import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from numpy.random import Generator

from train.tasks.lines import read_pairs
from train.tasks.tables import Table, tables
from train.tasks.task import Pair, Task, check_held_out, generator, normalized, splits

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_SURROGATE = re.compile("[\ud800-\udfff]")
"""A lone surrogate: half a character, which JSON can write and UTF-8 cannot."""


@dataclass(frozen=True)
class TranslationTask(Task):
    """Settings that decide which pairs of parallel text become examples."""

    validation_examples: int = 1_000
    """number of examples to hold out of the training text if there is no validation text"""
    test_examples: int = 1_000
    """number of examples to hold out of the training text if there is no test text"""
    max_characters: int = 1_000
    """maximum number of characters (in NFC) on each side of a training pair; longer pairs are left out of training
    only"""
    seed: int = 0
    """any integer; decides which examples are held out"""

    def choose(self, found: Mapping[str, Sequence[Pair]]) -> dict[str, Dataset]:
        """Makes the splits from the pairs found for "train" and perhaps for "validation" and "test".

        Pairs with a blank side are skipped; so are training pairs that are too long. The counts are logged. A missing
        split is held out of training as distinct sources. All pairs with a held-out source leave training, even with
        another target. Characters are counted, and sources compared, in NFC.

        Raises:
            ValueError: too few pairs are left; the message has the counts.
        """
        kept = {split: self._usable(split, normalized(pairs)) for split, pairs in found.items()}
        random = generator(self.seed)
        # The test first: a change of validation_examples then leaves the test as it is.
        for split, examples in (("test", self.test_examples), ("validation", self.validation_examples)):
            if split not in kept:
                kept[split], kept["train"] = _hold_out(split, examples, kept["train"], random)
        return splits(**kept)

    def _usable(self, split: str, pairs: Sequence[Pair]) -> list[Pair]:
        written = [pair for pair in pairs if all(text.strip() for text in pair)]
        kept = [pair for pair in written if split != "train" or max(map(len, pair)) <= self.max_characters]
        counts = (
            f"{len(kept)} of {len(pairs)} pairs kept, {len(pairs) - len(written)} have a blank side, "
            f"{len(written) - len(kept)} are longer than max_characters ({self.max_characters})"
        )
        if not kept:
            raise ValueError(f"nothing to use for {split}: {counts}")
        if len(kept) < len(pairs):
            log.warning("%s: %s", split, counts)
        return kept


def _hold_out(split: str, examples: int, pairs: Sequence[Pair], random: Generator) -> tuple[list[Pair], list[Pair]]:
    """Returns `examples` pairs of different sources, and the pairs without any of these sources."""
    first_target = dict(reversed(pairs))  # reversed, as a dict keeps the last target of a source
    sources = list(first_target)
    if not 1 <= examples < len(sources):
        raise ValueError(
            f"{split}_examples ({examples}) must be at least 1 and fewer than the {len(sources)} different sources "
            "of the training text"
        )
    chosen = [sources[number] for number in random.choice(len(sources), examples, replace=False)]
    held_out = {source: first_target[source] for source in chosen}
    return list(held_out.items()), [pair for pair in pairs if pair[0] not in held_out]


@dataclass(frozen=True)
class ParallelFiles(TranslationTask):
    """Parallel text in local UTF-8 files, plain or .gz: line n of the target file translates line n of the source file.

    `train.tasks.lines.read_lines` defines what a line is and which files are refused.
    """

    source: Path | None = None
    """training file in the source language, one sentence per line; required"""
    target: Path | None = None
    """training file in the target language, with the translation of each line; required"""
    validation_source: Path | None = None
    """validation file in the source language; if None, examples are held out of the training text"""
    validation_target: Path | None = None
    """validation file in the target language"""
    test_source: Path | None = None
    """test file in the source language; if None, examples are held out of the training text"""
    test_target: Path | None = None
    """test file in the target language"""

    def check_effect(self) -> None:
        """Checks that every setting of the held-out pairs has an effect.

        Raises:
            ValueError: a number of examples is set and its split has files, or the seed is set and both splits have.
        """
        given = [split for split in ("validation", "test") if getattr(self, f"{split}_source") is not None]
        check_held_out(self, {split: f"--task.{split}-source" for split in given}, "examples")

    def load(self) -> dict[str, Dataset]:
        """Reads the files and makes the splits.

        Raises:
            FileNotFoundError: a file does not exist; the message names the flag.
            ValueError: a file is not given (the message names the flag), two files have different numbers of lines, a
                line cannot be read, or too few pairs are left.
        """
        found = {"train": read_pairs(self._path("source"), self._path("target"))}
        if self.validation_source or self.validation_target:
            found["validation"] = read_pairs(self._path("validation_source"), self._path("validation_target"))
        if self.test_source or self.test_target:
            found["test"] = read_pairs(self._path("test_source"), self._path("test_target"))
        return self.choose(found)

    def _path(self, field: str) -> Path:
        path: Path | None = getattr(self, field)
        flag = "--task." + field.replace("_", "-")
        if path is None:
            raise ValueError(
                f"set {flag} to a text file: --task.source and --task.target are required, and another split needs "
                "both of its files"
            )
        if not path.is_file():
            raise FileNotFoundError(f"{flag}: there is no file {path}")
        return path


@dataclass(frozen=True)
class HubTranslation(TranslationTask):
    """A dataset of the Hugging Face hub, or a local folder in one of its file formats.

    The texts are either in one column of dictionaries, with a text for each language (the translation feature of the
    hub), or in two columns of text. Texts in JSON and CSV are read unchanged, even if all of them look like dates or
    numbers. A JSON number is not a text. Splits other than "train", "validation" and "test" are ignored.
    """

    name: str = ""
    """name of the dataset on the hub, or a local folder; required"""
    config: str | None = None
    """configuration of the dataset, if it has several"""
    revision: str | None = None
    """version of the dataset: a commit, tag or branch; None is the latest"""
    source_language: str | None = None
    """source language, as a key of the translation column; or set source_column"""
    target_language: str | None = None
    """target language, as a key of the translation column; or set target_column"""
    column: str = "translation"
    """name of the translation column"""
    source_column: str | None = None
    """name of a text column with the sources, instead of source_language"""
    target_column: str | None = None
    """name of a text column with the targets, instead of target_language"""

    def load(self) -> dict[str, Dataset]:
        """Reads the dataset and makes the splits.

        Raises:
            FileNotFoundError: the dataset does not exist.
            ValueError: a setting is missing or contradicts another one, the dataset cannot be read, a row has no text
                (the message names split, row and column), or too few pairs are left.
        """
        for flag, given in (
            ("--task.name", self.name),
            ("--task.source-language or --task.source-column", self.source_language or self.source_column),
            ("--task.target-language or --task.target-column", self.target_language or self.target_column),
        ):
            if not given:
                raise ValueError(f"set {flag}: translation from the hub needs a dataset, a source and a target")
        for side in ("source", "target"):
            column, language = getattr(self, f"{side}_column"), getattr(self, f"{side}_language")
            if column and language:
                raise ValueError(
                    f"--task.{side}-column ({column}) and --task.{side}-language ({language}) exclude each other: a "
                    "language is a key of the translation column"
                )
        # `datasets` identifies cached local files by their modification times, which may not change with their texts.
        # A fresh cache folder forces it to read them again.
        with tempfile.TemporaryDirectory() as fresh:
            found = self._tables(fresh if Path(self.name).is_dir() else None)
            return self.choose({split: self._pairs(split, table) for split, table in found.items()})

    def _tables(self, cache: str | None) -> dict[str, Table]:
        """Reads the splits that exist; `cache` is the cache folder of `datasets`."""
        try:
            builder = datasets.load_dataset_builder(self.name, self.config, revision=self.revision, cache_dir=cache)
        except RuntimeError as error:
            if "script" not in str(error):  # `datasets` refuses dataset scripts with a RuntimeError
                raise
            raise ValueError(f"{self.name} cannot be used: {error}") from error
        try:
            found = tables(builder, cache)
            read = {split: found[split]() for split in SPLITS if split in found}
        except DatasetGenerationError as error:  # the cause of this error says what is wrong with the file
            raise ValueError(f"{self.name} cannot be read: {error.__cause__ or error}") from error
        except ValueError as error:
            raise ValueError(f"{self.name} cannot be read: {error}") from error
        if "train" not in read:
            raise ValueError(f"{self.name} has no split 'train'; it has {sorted(found)}")
        return read

    def _pairs(self, split: str, table: Table) -> list[Pair]:
        where = f"{self.name}, split {split!r}"
        sources = self._texts(where, table, self.source_column, self.source_language)
        targets = self._texts(where, table, self.target_column, self.target_language)
        return list(zip(sources, targets, strict=True))

    def _texts(self, where: str, table: Table, column: str | None, language: str | None) -> list[str]:
        name = column or self.column
        if name not in table.columns:
            raise ValueError(f"{where}, has no column {name!r}; it has {list(table.columns)}")
        texts: list[str] = []
        for number, value in enumerate(table.columns[name][:]):
            text = value if column else value.get(language) if isinstance(value, dict) else None
            if not isinstance(text, str) or _SURROGATE.search(text):
                asked = "" if column else f" for {language!r}"
                place = f" ({table.places[number]})" if table.places else ""
                raise ValueError(f"{where}, row {number}, column {name!r}: no text{asked} in {value!r:.200}{place}")
            texts.append(text)
        return texts
