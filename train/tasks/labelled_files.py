"""Texts of one's own with labels: one for each text, or one for each of its characters."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from train.tasks.lines import read_lines
from train.tasks.own_files import OwnFiles
from train.tasks.tables import json_rows
from train.tasks.task import Pair, splits

_JSON = tuple(f".{kind}{packed}" for kind in ("jsonl", "ndjson", "json") for packed in ("", ".gz"))
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can write."""
_SHOWN = 5
"""Most names that a message lists."""


@dataclass(frozen=True)
class LabelledFiles(OwnFiles):
    """Labelled text of UTF-8 files, plain or .gz, for encoders that give labels to texts or to tokens.

    A line is a text, a tab and its label; the last tab counts, and there is no header. Files whose names end in .jsonl,
    .ndjson or .json, or that and .gz, hold JSON objects instead, one a line or in a list, with the text and the label
    in two of their columns. A text that is repeated is used once, with its first label, and is in one split alone.

    The label of a text is any word or words, or in JSON a whole number; no label is both. Labels of characters are one
    string of as many characters as the text has in Unicode's NFC: each is the label of the character at its place, as
    in "Ada lives in Rome", tab, "PPP..........LLLL". They need a tokenizer of characters.
    """

    labels: Literal["text", "character"] = "text"
    """what has a label: each text, for the head `text-labels`, or each character of it, for the head `token-labels`"""
    text_column: str = "text"
    """the column of the text, in JSON alone"""
    label_column: str = "label"
    """the column of the label, in JSON alone"""

    def encoder_objective(self) -> Literal["Tagging", "Classification"]:
        """A label for each character, or for each text, as `labels` says."""
        return "Tagging" if self.labels == "character" else "Classification"

    def load(self) -> dict[str, Dataset]:
        """The splits; ValueError or FileNotFoundError, naming file and line where there is one, if that cannot be."""
        divided = self.divide(self.found(partial(self._read, kinds={})))
        labels = {split: _labels(rows, self.labels) for split, rows in divided.items()}
        if len(labels["train"]) < 2:
            raise ValueError(f"labels must be two or more different ones, and training has {sorted(labels['train'])}")
        if unknown := (labels["validation"] | labels["test"]) - labels["train"]:
            raise ValueError(
                f"validation or test has the labels {_first(sorted(unknown))} and training has no example of them: "
                "give it some, or, where they were held out, another --task.seed"
            )
        return splits(**divided)

    def _read(self, file: Path, kinds: dict[str, tuple[type, str]]) -> Iterator[Pair]:
        """The examples of a file; `kinds` has whether labels are numbers in JSON, and where that was seen first."""
        rows = self._json(file, kinds) if file.name.lower().endswith(_JSON) else self._tabbed(file)
        for where, text, label in rows:
            yield text, self._checked(where, text, label)

    def _json(self, file: Path, kinds: dict[str, tuple[type, str]]) -> Iterator[tuple[str, str, str]]:
        text = "\n".join(read_lines(file))
        try:
            rows = list(json_rows(text))
        except ValueError as error:  # it starts with the line
            raise ValueError(f"{file}:{error}") from error
        in_line = Counter(line for line, _ in rows)
        allowed = (str, int) if self.labels == "text" else (str,)
        for number, (line, row) in enumerate(rows):
            where = f"{file}:{line}" + (f", row {number} (from 0)" if in_line[line] > 1 else "")
            text, label = _value(row, self.text_column, where, (str,)), _value(row, self.label_column, where, allowed)
            _check_kind(label.strip(), type(row[self.label_column]), where, kinds)
            yield where, text, label

    def _tabbed(self, file: Path) -> Iterator[tuple[str, str, str]]:
        for name in ("text_column", "label_column"):
            if (given := getattr(self, name)) != getattr(LabelledFiles, name):
                raise ValueError(
                    f"{file}: --task.{name.replace('_', '-')} ({given}) names a column of JSON, and a file of tabs has "
                    "none: leave it out, or end the name of a file of JSON in .jsonl"
                )
        for number, line in enumerate(read_lines(file), 1):
            text, tab, label = line.rpartition("\t")
            if not tab and line.strip():
                raise ValueError(f"{file}:{number}: no tab between a text and its label in {line!r:.60}")
            if number == 1 and _is_header(text, label):
                raise ValueError(
                    f"{file}:1: {line!r:.60} looks like the names of the columns, and a file of tabs has no header: "
                    "delete the line; an example that says this may stand in any other line"
                )
            yield f"{file}:{number}", text, label

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


def _is_header(text: str, label: str) -> bool:
    """Whether the first line names columns: "text" and "label", in either order, or whatever beside "label"."""
    columns = text.strip().casefold(), label.strip().casefold()
    return columns[1] == "label" or columns == ("label", "text")


def _check_kind(label: str, kind: type, where: str, kinds: dict[str, tuple[type, str]]) -> None:
    """Raises ValueError where a label of JSON is a text and the same was a number before, or the other way round."""
    before, there = kinds.setdefault(label, (kind, where))
    if kind is not before:
        names = {str: f'the text "{label}"', int: f"the number {label}"}
        raise ValueError(
            f"{where}: a label is {names[kind]}, and one at {there} is {names[before]}: write them alike, or, if they "
            "are two labels, under two names"
        )


def _first(names: Sequence[str]) -> str:
    """The names as a list, cut where they are many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{list(names[:_SHOWN])}{more}"


def _value(row: Mapping[str, Any], column: str, where: str, kinds: tuple[type, ...]) -> str:
    if column not in row:
        raise ValueError(f"{where}: no column {column!r}, the row has {_first(list(row))}")
    value = row[column]
    if not isinstance(value, kinds) or isinstance(value, bool) or _SURROGATE.search(str(value)):
        asked = "a text" if kinds == (str,) else "a text or a whole number"
        raise ValueError(f"{where}: {value!r:.60} in column {column!r} is not {asked}")
    return str(value)
