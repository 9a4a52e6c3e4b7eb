"""Translation: the examples are parallel text, from local files or from the Hugging Face hub."""

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
from train.tasks.task import Pair, Task, generator, normalized, splits

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can write."""


@dataclass(frozen=True)
class TranslationTask(Task):
    """How examples are chosen from parallel text."""

    validation_examples: int = 1_000
    """examples to hold out of the training text where there is no validation text"""
    test_examples: int = 1_000
    """examples to hold out of the training text where there is no test text"""
    max_characters: int = 1_000
    """training pairs with a longer text on either side, in NFC, are left out; validation and test text is kept whole"""
    seed: int = 0
    """any integer; it decides which examples are held out"""

    def choose(self, found: Mapping[str, Sequence[Pair]]) -> dict[str, Dataset]:
        """The splits from the pairs found for "train" and perhaps for "validation" and "test".

        Pairs with a blank side are skipped, and in training those that are too long; the counts are logged. What was
        not found is held out of training: so many distinct sources, none of which stays in training with another
        target. Characters are counted, and sources compared, in NFC. Raises ValueError, naming the counts, where too
        little is left.
        """
        kept = {split: self._usable(split, normalized(pairs)) for split, pairs in found.items()}
        random = generator(self.seed)
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
    """So many pairs of different sources, and the pairs with none of these sources."""
    first_target = dict(reversed(pairs))
    sources = list(first_target)
    if not 1 <= examples < len(sources):
        raise ValueError(
            f"{split}_examples ({examples}) must be at least 1 and fewer than the {len(sources)} different sources "
            "that they are held out of"
        )
    chosen = [sources[number] for number in random.choice(len(sources), examples, replace=False)]
    held_out = {source: first_target[source] for source in chosen}
    return list(held_out.items()), [pair for pair in pairs if pair[0] not in held_out]


@dataclass(frozen=True)
class ParallelFiles(TranslationTask):
    """Parallel text in local files of UTF-8, plain or .gz: a line of one file translates the same line of the other.

    `train.tasks.lines.read_pairs` says what a line is and which files are refused.
    """

    source: Path | None = None
    """text to train on, one sentence a line"""
    target: Path | None = None
    """its translation, line by line"""
    validation_source: Path | None = None
    """text to watch over the training; without it, examples are held out of the training text"""
    validation_target: Path | None = None
    """its translation"""
    test_source: Path | None = None
    """text to judge the trained model; without it, examples are held out of the training text"""
    test_target: Path | None = None
    """its translation"""

    def load(self) -> dict[str, Dataset]:
        """The splits; ValueError or FileNotFoundError, naming the flag, where a file is not given or not there."""
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
                f"set {flag} to a text file: --task.source and --task.target are needed, and so are both files of "
                "any other split"
            )
        if not path.is_file():
            raise FileNotFoundError(f"{flag}: there is no file {path}")
        return path


@dataclass(frozen=True)
class HubTranslation(TranslationTask):
    """A dataset of the Hugging Face hub, or a local folder of its file formats.

    Its texts are either in one column of dictionaries, a text for each language (the hub's translation feature), or
    in two columns of text. In JSON and CSV texts are what stands there, also where all are dates or digits; a number of
    JSON is none. Splits other than "train", "validation" and "test" are not used.
    """

    name: str = ""
    """the dataset's name on the hub, or a folder"""
    config: str | None = None
    """which of the dataset's configurations, where it has several"""
    revision: str | None = None
    """the version: a commit, a tag or a branch"""
    source_language: str | None = None
    """the language to translate from, as the translation column names it"""
    target_language: str | None = None
    """the language to translate to, as the translation column names it"""
    column: str = "translation"
    """the translation column"""
    source_column: str | None = None
    """a column of text to translate from, in place of a language"""
    target_column: str | None = None
    """a column of text to translate to, in place of a language"""

    def load(self) -> dict[str, Dataset]:
        """The splits; ValueError, naming split and row where there is one, if they lack what the settings ask for."""
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
                    "language is one of the translation column"
                )
        # What was once read from a folder is known by the times of its files, which may stay where their texts change.
        with tempfile.TemporaryDirectory() as fresh:
            found = self._tables(fresh if Path(self.name).is_dir() else None)
            return self.choose({split: self._pairs(split, table) for split, table in found.items()})

    def _tables(self, cache: str | None) -> dict[str, Table]:
        """The splits that are there; `cache` is for what `datasets` makes of the files."""
        try:
            builder = datasets.load_dataset_builder(self.name, self.config, revision=self.revision, cache_dir=cache)
        except RuntimeError as error:
            if "script" not in str(error):  # which is not run
                raise
            raise ValueError(f"{self.name} cannot be used: {error}") from error
        try:
            found = tables(builder, cache)
            read = {split: found[split]() for split in SPLITS if split in found}
        except DatasetGenerationError as error:  # it hides what is wrong with the file in its cause
            raise ValueError(f"{self.name} cannot be read: {error.__cause__ or error}") from error
        except ValueError as error:
            raise ValueError(f"{self.name} cannot be read: {error}") from error
        if "train" not in read:
            raise ValueError(f"{self.name} has no split 'train', it has {sorted(found)}")
        return read

    def _pairs(self, split: str, table: Table) -> list[Pair]:
        where = f"{self.name}, split {split!r}"
        sources = self._texts(where, table, self.source_column, self.source_language)
        targets = self._texts(where, table, self.target_column, self.target_language)
        return list(zip(sources, targets, strict=True))

    def _texts(self, where: str, table: Table, column: str | None, language: str | None) -> list[str]:
        name = column or self.column
        if name not in table.columns:
            raise ValueError(f"{where}, has no column {name!r}, it has {list(table.columns)}")
        texts: list[str] = []
        for number, value in enumerate(table.columns[name][:]):
            text = value if column else value.get(language) if isinstance(value, dict) else None
            if not isinstance(text, str) or _SURROGATE.search(text):
                asked = "" if column else f" for {language!r}"
                place = f" ({table.places[number]})" if table.places else ""
                raise ValueError(f"{where}, row {number}, column {name!r}: no text{asked} in {value!r:.200}{place}")
            texts.append(text)
        return texts
