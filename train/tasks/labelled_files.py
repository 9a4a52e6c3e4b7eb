"""Texts of one's own with labels: one for each text, or one for each of its characters."""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from train.tasks.lines import read_lines
from train.tasks.own_files import OwnFiles
from train.tasks.tables import json_rows
from train.tasks.task import Pair, splits

_JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can write."""


@dataclass(frozen=True)
class LabelledFiles(OwnFiles):
    """Labelled text of UTF-8 files, plain or .gz, for encoders that give labels to texts or to tokens.

    A line is a text, a tab and its label; the last tab counts. Files whose names end in .jsonl or .json, or that and
    .gz, hold JSON objects instead, one a line or in a list, with the text and the label in two of their columns. A text
    that is repeated is used once, with its first label, and is in one split alone.

    The label of a text is any word or words, or in JSON a whole number. Labels of characters are one string of as many
    characters as the text has in Unicode's NFC: each is the label of the character at its place, as in "Ada lives in
    Rome", tab, "PPP..........LLLL". They need a tokenizer of characters.
    """

    labels: Literal["text", "character"] = "text"
    """what has a label: each text, for the head `text-labels`, or each character of it, for the head `token-labels`"""
    text_column: str = "text"
    """the column of the text, in JSON"""
    label_column: str = "label"
    """the column of the label, in JSON"""

    def encoder_objective(self) -> Literal["Tagging", "Classification"]:
        """A label for each character, or for each text, as `labels` says."""
        return "Tagging" if self.labels == "character" else "Classification"

    def load(self) -> dict[str, Dataset]:
        """The splits; ValueError or FileNotFoundError, naming file and line where there is one, if that cannot be."""
        divided = self.divide(self.found(self._read))
        labels = {split: _labels(rows, self.labels) for split, rows in divided.items()}
        if len(labels["train"]) < 2:
            raise ValueError(f"labels must be two or more different ones, and training has {sorted(labels['train'])}")
        if unknown := (labels["validation"] | labels["test"]) - labels["train"]:
            raise ValueError(
                f"validation or test has the labels {sorted(unknown)} and training has no example of them: give it "
                "some, or, where they were held out, another --task.seed"
            )
        return splits(**divided)

    def _read(self, file: Path) -> Iterator[Pair]:
        rows = self._json(file) if file.name.endswith(_JSON) else _tabbed(file)
        for where, text, label in rows:
            yield text, self._checked(where, text, label)

    def _json(self, file: Path) -> Iterator[tuple[str, str, str]]:
        text = "\n".join(read_lines(file))
        try:
            rows = list(json_rows(text))
        except ValueError as error:  # it starts with the line
            raise ValueError(f"{file}:{error}") from error
        for line, row in rows:
            where = f"{file}:{line}"
            yield where, _value(row, self.text_column, where, (str,)), _value(row, self.label_column, where, (str, int))

    def _checked(self, where: str, text: str, label: str) -> str:
        if not text.strip():
            return label
        if self.labels == "text":
            if not label.strip():
                raise ValueError(f"{where}: no label of the text {text!r:.60}")
            return label.strip()
        counts = [len(unicodedata.normalize("NFC", each)) for each in (label, text)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"{where}: {counts[0]} labels of {counts[1]} characters (in NFC) of the text {text!r:.60}; for one "
                "label of the whole text, set --task.labels text"
            )
        return label


def _labels(rows: list[Pair], of: Literal["text", "character"]) -> set[str]:
    return {each for _, label in rows for each in ([label] if of == "text" else label)}


def _tabbed(file: Path) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(read_lines(file), 1):
        text, tab, label = line.rpartition("\t")
        if not tab and line.strip():
            raise ValueError(f"{file}:{number}: no tab between a text and its label in {line!r:.60}")
        yield f"{file}:{number}", text, label


def _value(row: Mapping[str, Any], column: str, where: str, kinds: tuple[type, ...]) -> str:
    if column not in row:
        raise ValueError(f"{where}: no column {column!r}, the row has {list(row)}")
    value = row[column]
    if not isinstance(value, kinds) or isinstance(value, bool) or _SURROGATE.search(str(value)):
        asked = "a text" if kinds == (str,) else "a text or a whole number"
        raise ValueError(f"{where}: {value!r:.60} in column {column!r} is not {asked}")
    return str(value)
