"""Translation: parallel text from local files or from the Hugging Face hub."""

import hashlib
import logging
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from numpy.random import Generator

from train.data.texts import write_texts
from train.tasks.lines import ParallelLines
from train.tasks.tables import Table, tables
from train.tasks.task import Pair, Task, check_held_out, check_none_empty, generator, normalized, splits

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

    def choose(self, found: Mapping[str, Iterable[Pair]]) -> dict[str, Dataset]:
        """Makes the splits from the pairs found for "train" and perhaps for "validation" and "test".

        Pairs with a blank side are skipped; so are training pairs that are too long. The counts are logged. A missing
        split is held out of training as distinct sources. All pairs with a held-out source leave training, even with
        another target. Characters are counted, and sources compared, in NFC.

        Args:
            found: the pairs of each split, which are iterated over two times.

        Raises:
            ValueError: too few pairs are left; the message has the counts.
        """
        return splits(**{split: list(pairs) for split, pairs in self._chosen(found)})

    def write_chosen(self, found: Mapping[str, Iterable[Pair]], folder: Path) -> None:
        """Writes the splits of `choose` to a folder, as `Task.write`, without all pairs in memory."""
        counts = {split: write_texts(pairs, folder / f"{split}.arrow") for split, pairs in self._chosen(found)}
        check_none_empty(**counts)

    def _chosen(self, found: Mapping[str, Iterable[Pair]]) -> Iterator[tuple[str, Iterable[Pair]]]:
        """Yields the splits with their pairs. The pairs of a split must be taken before those of the next."""
        sources = {split: self._sources(split, pairs) for split, pairs in found.items()}
        random, left = generator(self.seed), sources["train"]
        held_out: dict[str, dict[int, Pair | None]] = {}
        # The test first: a change of validation_examples then leaves the test as it is.
        for split, examples in (("test", self.test_examples), ("validation", self.validation_examples)):
            if split not in found:
                chosen = _hold_out(split, examples, left, random)
                left = left[~np.isin(left, chosen)]
                held_out[split] = dict.fromkeys(chosen.tolist())
        # Taking the training pairs fills the held-out splits.
        yield "train", _without(self._usable("train", found["train"]), list(held_out.values()))
        for split in ("validation", "test"):
            pairs = held_out.get(split)
            yield split, self._usable(split, found[split]) if pairs is None else filter(None, pairs.values())

    def _usable(self, split: str, pairs: Iterable[Pair]) -> Iterator[Pair]:
        return (pair for pair in normalized(pairs) if self._is_written(pair) and not self._is_long(split, pair))

    def _is_written(self, pair: Pair) -> bool:
        return all(text.strip() for text in pair)

    def _is_long(self, split: str, pair: Pair) -> bool:
        return split == "train" and max(map(len, pair)) > self.max_characters

    def _sources(self, split: str, pairs: Iterable[Pair]) -> np.ndarray:
        """Returns a digest of the source of each usable pair, uint64 `[n]`, and logs how many pairs are left out."""
        sources, total, blank = array("Q"), 0, 0
        for pair in normalized(pairs):
            total += 1
            if not self._is_written(pair):
                blank += 1
            elif not self._is_long(split, pair):
                sources.append(_digest(pair[0]))
        counts = (
            f"{len(sources)} of {total} pairs kept, {blank} have a blank side, "
            f"{total - blank - len(sources)} are longer than max_characters ({self.max_characters})"
        )
        if not sources:
            raise ValueError(f"nothing to use for {split}: {counts}")
        if len(sources) < total:
            log.warning("%s: %s", split, counts)
        return np.frombuffer(sources, np.uint64)


def _digest(text: str) -> int:
    # 64 bits stand for a text: two of ten million texts share them with a probability of 3 in a million, and then leave
    # training together.
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def _hold_out(split: str, examples: int, sources: np.ndarray, random: Generator) -> np.ndarray:
    """Draws `examples` different sources; returns their digests in the order in which they were drawn."""
    # In the order of their last occurrence, the latest first.
    distinct, first = np.unique(sources[::-1], return_index=True)
    distinct = distinct[np.argsort(first)]
    if not 1 <= examples < len(distinct):
        raise ValueError(
            f"{split}_examples ({examples}) must be at least 1 and fewer than the {len(distinct)} different sources "
            "of the training text"
        )
    return distinct[random.choice(len(distinct), examples, replace=False)]


def _without(pairs: Iterable[Pair], held_out: Sequence[dict[int, Pair | None]]) -> Iterator[Pair]:
    """Yields the pairs whose source is not held out; puts the first pair of each other source into its split."""
    if not held_out:
        yield from pairs
        return
    for pair in pairs:
        source = _digest(pair[0])
        split = next((split for split in held_out if source in split), None)
        if split is None:
            yield pair
        elif split[source] is None:
            split[source] = pair


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
        return self.choose(self._found())

    def files(self) -> tuple[Path, ...]:
        """Returns the files of all splits; raises as `load` if one is missing."""
        return tuple(file for lines in self._found().values() for file in (lines.source, lines.target))

    def write(self, folder: Path) -> None:
        """Writes the splits of `load`, as `Task.write`; few of the pairs are in memory at a time."""
        self.write_chosen(self._found(), folder)

    def _found(self) -> dict[str, ParallelLines]:
        found = {"train": ParallelLines(self._path("source"), self._path("target"))}
        for split in ("validation", "test"):
            if getattr(self, f"{split}_source") or getattr(self, f"{split}_target"):
                found[split] = ParallelLines(self._path(f"{split}_source"), self._path(f"{split}_target"))
        return found

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
